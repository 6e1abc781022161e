"""Triton: the gradients of the chunks of linear attention's recurrence; names as in `recurrence`.

With the delta rule, u = beta r and r = (1 + overlap diag(beta))⁻¹ (value − from_start S). Of a
gradient g of u, e = (1 + diag(beta) overlap)⁻ᵀ g gives all others: beta e is that of value, −beta e
that of from_start S, −beta e uᵀ that of overlap, and the row sums of r ∘ e are that of beta.
"""
# No `from __future__ import annotations`: Triton reads the annotations themselves.
# mypy: ignore-errors

import triton
import triton.language as tl

from .forward_kernel import along, between, corner, factors, put, square, tile, to_border, written


@triton.jit
def give(
    flow, scores, grad, after, out, sizes,
    KIND: tl.constexpr, DELTA: tl.constexpr, T: tl.constexpr, F: tl.constexpr, V: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of u in V columns of a chunk; with the delta rule without the state's part."""
    tokens = sizes.tokens
    features = sizes.features
    columns = sizes.columns
    chunks = sizes.chunks
    at = tl.program_id(0)
    n = (at // (chunks * sizes.v_blocks)).to(tl.int64)
    chunk = at // sizes.v_blocks % chunks
    v = at % sizes.v_blocks * V + tl.arange(0, V)
    i = tl.arange(0, T)
    rows = chunk * T + i
    row_in = rows < tokens
    total = tl.zeros([T, V], tl.float32)
    # Heads that share keys and values share their gradient: summed here, in one order
    for g in range(sizes.group):
        head = n * sizes.group + g
        read = tile(grad + head * tokens * columns, rows, row_in, v, columns)
        weights = tl.trans(square(scores, head * chunks + chunk, i, T))
        total += tl.dot(weights, read, input_precision=PRECISION)
    if not DELTA:
        after += (n * chunks + chunk) * features * columns
        for first in range(0, features, F):
            f = first + tl.arange(0, F)
            k = tile(flow.key + n * tokens * features, rows, row_in, f, features)
            own = flow.decay + n * tokens * sizes.decay_width
            _, end, _ = factors(own, rows, i, tokens, f, features, KIND, T)
            state = tile(after, f, f < features, v, columns)
            total += tl.dot(k * end, state, input_precision=PRECISION)
    put(out + n * tokens * columns, total, rows, row_in, v, columns)


@triton.jit
def walk_back(
    flow, inverses, grad, given, grad_last, after, solved, d_memory, sizes,
    KIND: tl.constexpr, DELTA: tl.constexpr, T: tl.constexpr, F: tl.constexpr, V: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of the state after each chunk and before the first; with the delta rule e, too.

    As `walk`, from the last chunk to the first. given: of u, from `give`; solved: e.
    """
    tokens = sizes.tokens
    features = sizes.features
    columns = sizes.columns
    chunks = sizes.chunks
    at = tl.program_id(0)
    n = (at // (sizes.f_blocks * sizes.v_blocks)).to(tl.int64)
    f = at // sizes.v_blocks % sizes.f_blocks * F + tl.arange(0, F)
    v = at % sizes.v_blocks * V + tl.arange(0, V)
    i = tl.arange(0, T)
    decay = flow.decay + n * tokens * sizes.decay_width
    f_in = f < features
    state = tile(grad_last + n * features * columns, f, f_in, v, columns)
    for back in range(chunks):
        chunk = chunks - 1 - back
        # After the chunk: with it `gradients` computes all chunks side by side
        put(after + (n * chunks + chunk) * features * columns, state, f, f_in, v, columns)
        rows = chunk * T + i
        row_in = rows < tokens
        start, end, through = factors(decay, rows, i, tokens, f, features, KIND, T)
        before = state * through
        for g in range(sizes.group):
            head = (n * sizes.group + g) * tokens
            q = tile(flow.query + head * features, rows, row_in, f, features)
            read = tile(grad + head * columns, rows, row_in, v, columns)
            before += tl.dot(tl.trans(q * start), read, input_precision=PRECISION)
        if DELTA:
            k = tile(flow.key + n * tokens * features, rows, row_in, f, features)
            e = tile(given + n * tokens * columns, rows, row_in, v, columns)
            e += tl.dot(k * end, state, input_precision=PRECISION)
            by_chunk = tl.trans(square(inverses, n * chunks + chunk, i, T))
            e = tl.dot(by_chunk, e, input_precision=PRECISION)
            put(solved + n * tokens * columns, e, rows, row_in, v, columns)
            e *= tl.load(flow.beta + n * tokens + rows, mask=row_in, other=0)[:, None]
            before -= tl.dot(tl.trans(k * start), e, input_precision=PRECISION)
        state = before
    put(d_memory + n * features * columns, state, f, f_in, v, columns)


@triton.jit
def products(
    left, right, decay, beta, scores, out, d_decay,
    tokens, columns, v_dim, group, chunks,
    KIND: tl.constexpr, DELTA: tl.constexpr, OWN: tl.constexpr, T: tl.constexpr, V: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of the pairs: of the queries' (OWN) grad uᵀ, of the keys' −beta e uᵀ.

    Where one decay serves all features (KIND 1), that of left · right before it decays, and what
    the pairs give to the decays. right: values, or r.
    """
    at = tl.program_id(0)
    n = (at // chunks).to(tl.int64)
    mine = n // group
    i = tl.arange(0, T)
    rows = at % chunks * T + i
    row_in = rows < tokens
    total = tl.zeros([T, T], tl.float32)
    for first in range(0, columns, V):
        v = first + tl.arange(0, V)
        a = tile(left + n * tokens * columns, rows, row_in, v, columns)
        base, strength = right + mine * tokens * v_dim, beta + mine * tokens
        u = written(base, strength, rows, row_in, v, v_dim, columns, DELTA)
        total += tl.dot(a, tl.trans(u), input_precision=PRECISION)
    if OWN:
        total = tl.where(i[None, :] <= i[:, None], total, 0.0)
    else:
        total *= -tl.load(beta + mine * tokens + rows, mask=row_in, other=0)[:, None]
        total = tl.where(i[None, :] < i[:, None], total, 0.0)
    if KIND == 1:
        by_pair = total * square(scores, at, i, T)
        later = tl.cumsum(by_pair, 0, reverse=True)
        by_token = tl.sum(tl.where(i[None, :] < i[:, None], later, 0.0), 1)
        tl.store(d_decay + n * tokens + rows, by_token, mask=row_in)
        total *= between(decay + mine * tokens, rows, i, tokens, T)
    tl.store(out + at.to(tl.int64) * T * T + i[:, None] * T + i[None, :], total)


@triton.jit
def through_pairs(
    grad, left, right, decay, rows, i, tokens, f, features, d_left, d_right, by_decay,
    KIND: tl.constexpr, OWN: tl.constexpr, T: tl.constexpr, F: tl.constexpr, LEVELS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """d_left, d_right and by_decay with what the pairs' gradient adds to them."""
    if KIND == 2:
        # Read here: what a loop around this has in common is held in registers from its beginning
        d = tile(decay, rows, rows < tokens, f, features)
        after = tile(decay, rows + 1, rows + 1 < tokens, f, features)
        for level in tl.static_range(LEVELS):
            second, before = to_border(d, after, i, 1 << level, T, F)
            part = tl.where(corner(i, 1 << level), grad, 0.0)
            a = left * second
            b = right * before
            d_a = tl.dot(part, b, input_precision=PRECISION)
            d_b = tl.dot(tl.trans(part), a, input_precision=PRECISION)
            d_left += d_a * second
            d_right += d_b * before
            b *= d_b
            # A token's decay stands in its own factor and the later ones of the second half, and in
            # the earlier ones of the first
            by_decay += along(a * d_a, 1 << level, T, F, True)
            by_decay += along(b, 1 << level, T, F, False) - b
        if OWN:
            own = tl.sum(tl.where(i[:, None] == i[None, :], grad, 0.0), 1)[:, None]
            d_left += own * right
            d_right += own * left
    else:
        d_left += tl.dot(grad, right, input_precision=PRECISION)
        d_right += tl.dot(tl.trans(grad), left, input_precision=PRECISION)
    return d_left, d_right, by_decay


@triton.jit
def gradients(
    flow, value, grad, solved, states, after, d_pairs, d_overlap, d_query, d_key, d_decay, sizes,
    KIND: tl.constexpr, DELTA: tl.constexpr, T: tl.constexpr, F: tl.constexpr, V: tl.constexpr,
    LEVELS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of queries, keys and decays, in F features of a chunk. value: r with the delta rule.

    d_decay: (batch · state_heads, tokens, features), or where one decay serves all features
    (blocks of features, batch · state_heads, tokens), to be summed, without what comes by pairs.
    """
    tokens = sizes.tokens
    features = sizes.features
    columns = sizes.columns
    chunks = sizes.chunks
    group = sizes.group
    v_dim = sizes.v_dim
    beta = flow.beta
    at = tl.program_id(0)
    n = (at // (chunks * sizes.f_blocks)).to(tl.int64)
    chunk = at // sizes.f_blocks % chunks
    block = at % sizes.f_blocks
    f = block * F + tl.arange(0, F)
    f_in = f < features
    i = tl.arange(0, T)
    rows = chunk * T + i
    row_in = rows < tokens
    here = n * tokens
    decay = flow.decay + here * sizes.decay_width
    states += (n * chunks + chunk) * features * columns
    after += (n * chunks + chunk) * features * columns
    k = tile(flow.key + here * features, rows, row_in, f, features)
    start, end, through = factors(decay, rows, i, tokens, f, features, KIND, T)
    d_k = tl.zeros([T, F], tl.float32)
    d_from_start = tl.zeros([T, F], tl.float32)
    by_through = tl.zeros([F], tl.float32)
    for first in range(0, columns, V):
        v = first + tl.arange(0, V)
        u = written(
            value + here * v_dim, beta + here, rows, row_in, v, v_dim, columns, DELTA
        )  # fmt: skip
        d_state = tile(after, f, f_in, v, columns)
        d_k += tl.dot(u, tl.trans(d_state), input_precision=PRECISION)
        if KIND > 0 or DELTA:
            state = tile(states, f, f_in, v, columns)
            by_through += tl.sum(state * d_state, 1)
            if DELTA:
                e = written(
                    solved + here * columns, beta + here, rows, row_in, v, columns, columns, True
                )
                d_from_start -= tl.dot(e, tl.trans(state), input_precision=PRECISION)
    d_k *= end
    by_end = d_k * k
    d_from_start *= start
    by_start = d_from_start * k
    d_k += d_from_start
    by_decay = tl.zeros([T, F], tl.float32)
    for g in range(group):
        head = n * group + g
        q = tile(flow.query + head * tokens * features, rows, row_in, f, features)
        d_q = tl.zeros([T, F], tl.float32)
        for first in range(0, columns, V):
            v = first + tl.arange(0, V)
            a = tile(grad + head * tokens * columns, rows, row_in, v, columns)
            state = tile(states, f, f_in, v, columns)
            d_q += tl.dot(a, tl.trans(state), input_precision=PRECISION)
        d_q *= start
        by_start += d_q * q
        by_pair = square(d_pairs, head * chunks + chunk, i, T)
        d_q, d_k, by_decay = through_pairs(
            by_pair, q, k, decay, rows, i, tokens, f, features, d_q, d_k, by_decay,
            KIND, True, T, F, LEVELS, PRECISION,
        )  # fmt: skip
        put(d_query + head * tokens * features, d_q, rows, row_in, f, features)
    if DELTA:
        by_pair = square(d_overlap, n * chunks + chunk, i, T)
        d_left = tl.zeros([T, F], tl.float32)
        d_left, d_k, by_decay = through_pairs(
            by_pair, k, k, decay, rows, i, tokens, f, features, d_left, d_k, by_decay,
            KIND, False, T, F, LEVELS, PRECISION,
        )  # fmt: skip
        d_k += d_left
    put(d_key + here * features, d_k, rows, row_in, f, features)
    if KIND == 2:
        by_decay += tl.cumsum(by_start, 0, reverse=True) + tl.cumsum(by_end, 0) - by_end
        by_decay += tl.trans(by_through[:, None] * through)
        put(d_decay + here * features, by_decay, rows, row_in, f, features)
    elif KIND == 1:
        by_token = tl.sum(by_end, 1)
        total = tl.cumsum(tl.sum(by_start, 1), 0, reverse=True) + tl.cumsum(by_token, 0) - by_token
        total += tl.sum(by_through, 0) * through
        tl.store(d_decay + (block * sizes.states + n) * tokens + rows, total, mask=row_in)
