"""Triton: the chunks of linear attention's recurrence, forward.

    S_t = exp(decay_t) ∘ S_{t−1} + key_t u_tᵀ        out_t = S_tᵀ query_t
    u_t = value_t, or with the delta rule  u_t = beta_t r_t
    r_t = value_t − (exp(decay_t) ∘ S_{t−1})ᵀ key_t

`pairs`: query_i · key_j, decayed over j + 1 … i, of each chunk; with the delta rule the keys' own,
too, whose triangle `inverse` inverts. `walk`: the state before each chunk, from chunk to chunk, and
r; `read`: what the queries read. Chunks are T tokens, filled up with zeros that let the state pass.

Decays enter as exponentials of sums over stretches, each added up from its own terms: none exceeds
1 or loses digits to a difference of long sums (Yang et al. 2024, GLA, section 4.3). A decay per
channel (KIND 2) has no T × T matrix of its own; there, j and i meet at the border between the
halves of 2, 4, … T tokens that part them.
"""
# No `from __future__ import annotations`: Triton reads the annotations themselves.
# mypy: ignore-errors

import triton
import triton.language as tl


@triton.jit
def tile(base, rows, row_in, cols, width):
    """(rows, cols) of a matrix of so many columns, 0 outside; float32."""
    own = base + rows[:, None].to(tl.int64) * width + cols[None, :]
    return tl.load(own, mask=row_in[:, None] & (cols < width)[None, :], other=0).to(tl.float32)


@triton.jit
def put(base, x, rows, row_in, cols, width):
    own = base + rows[:, None].to(tl.int64) * width + cols[None, :]
    tl.store(own, x.to(base.dtype.element_ty), mask=row_in[:, None] & (cols < width)[None, :])


@triton.jit
def square(base, at, i, T: tl.constexpr):
    """The T × T matrix of that number."""
    return tl.load(base + at.to(tl.int64) * T * T + i[:, None] * T + i[None, :])


@triton.jit
def written(base, beta, rows, row_in, cols, width, columns, DELTA: tl.constexpr):
    """u: values with columns of ones beyond their width, or with the delta rule beta r."""
    u = tile(base, rows, row_in, cols, width)
    u = tl.where((cols >= width)[None, :] & (cols < columns)[None, :], 1.0, u)
    if DELTA:
        u *= tl.load(beta + rows, mask=row_in, other=0)[:, None]
    return u


@triton.jit
def factors(decay, rows, i, tokens, cols, width, KIND: tl.constexpr, T: tl.constexpr):
    """From the chunk's start to each token, from each to its end, and through the whole chunk.

    (T, F), (T, F), (F, 1); a dimension of features is 1, or none, where one decay serves all.
    """
    # Read one token on: what is added up from a token's end to the chunk's leaves out its own decay
    later = (rows + 1 < tokens) & (i + 1 < T)
    if KIND == 2:
        d = tile(decay, rows, rows < tokens, cols, width)
        after = tile(decay, rows + 1, later, cols, width)
        start = tl.exp(tl.cumsum(d, 0))
        end = tl.exp(tl.cumsum(after, 0, reverse=True))
        through = tl.exp(tl.sum(d, 0))[:, None]
    elif KIND == 1:
        d = tl.load(decay + rows, mask=rows < tokens, other=0)
        after = tl.load(decay + rows + 1, mask=later, other=0)
        start = tl.exp(tl.cumsum(d, 0))[:, None]
        end = tl.exp(tl.cumsum(after, 0, reverse=True))[:, None]
        through = tl.exp(tl.sum(d, 0))
    else:
        start = 1.0
        end = 1.0
        through = 1.0
    return start, end, through


@triton.jit
def between(decay, rows, i, tokens, T: tl.constexpr):
    """(T, T): the factor over j + 1 … i of one decay for all features; 1 where j ≥ i."""
    d = tl.load(decay + rows, mask=rows < tokens, other=0)
    return tl.exp(tl.cumsum(tl.where(i[:, None] > i[None, :], d[:, None], 0.0), 0))


@triton.jit
def along(x, SIZE: tl.constexpr, T: tl.constexpr, F: tl.constexpr, REVERSE: tl.constexpr):
    """Sums up to each token, or from it on, within stretches of SIZE tokens."""
    if SIZE == T:
        x = tl.cumsum(x, 0, reverse=REVERSE)
    elif SIZE > 1:
        x = tl.reshape(x, [T // SIZE, SIZE, F])
        x = tl.reshape(tl.cumsum(x, 1, reverse=REVERSE), [T, F])
    return x


@triton.jit
def to_border(d, after, i, HALF: tl.constexpr, T: tl.constexpr, F: tl.constexpr):
    """Factors, each within its half: from its beginning to the token, from the token to its end.

    d and after (T, F): the decays of each token and of the next.
    """
    after = tl.where(((i + 1) % HALF != 0)[:, None], after, 0.0)
    return tl.exp(along(d, HALF, T, F, False)), tl.exp(along(after, HALF, T, F, True))


@triton.jit
def corner(i, half):
    """(T, T): i stands in the second of two halves, and j in the first."""
    row = (i // half)[:, None]
    return (row % 2 == 1) & (row - 1 == (i // half)[None, :])


@triton.jit
def pairs(
    left, right, decay, out, tokens, features, decay_width, group, chunks,
    KIND: tl.constexpr, OWN: tl.constexpr, T: tl.constexpr, F: tl.constexpr, LEVELS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """left_i · right_j, decayed over j + 1 … i, for j < i (OWN: ≤ i), else 0. A program a chunk."""
    at = tl.program_id(0)
    n = (at // chunks).to(tl.int64)
    i = tl.arange(0, T)
    rows = at % chunks * T + i
    row_in = rows < tokens
    left += n * tokens * features
    right += n // group * tokens * features
    decay += n // group * tokens * decay_width
    scores = tl.zeros([T, T], tl.float32)
    for first in range(0, features, F):
        cols = first + tl.arange(0, F)
        a = tile(left, rows, row_in, cols, features)
        b = tile(right, rows, row_in, cols, features)
        if KIND == 2:
            d = tile(decay, rows, row_in, cols, features)
            after = tile(decay, rows + 1, rows + 1 < tokens, cols, features)
            # Through the border between halves both factors are of decays ahead: none exceeds 1.
            # From the chunk's beginning instead, one would be the inverse of the other, and
            # overflow
            for level in tl.static_range(LEVELS):
                second, before = to_border(d, after, i, 1 << level, T, F)
                part = tl.dot(a * second, tl.trans(b * before), input_precision=PRECISION)
                scores += tl.where(corner(i, 1 << level), part, 0.0)
            if OWN:
                scores += tl.where(i[:, None] == i[None, :], tl.sum(a * b, 1)[:, None], 0.0)
        else:
            scores += tl.dot(a, tl.trans(b), input_precision=PRECISION)
    if KIND < 2:
        earlier = i[None, :] < i[:, None]
        if OWN:
            earlier = i[None, :] <= i[:, None]
        if KIND == 1:
            scores *= between(decay, rows, i, tokens, T)
        scores = tl.where(earlier, scores, 0.0)
    tl.store(out + at.to(tl.int64) * T * T + i[:, None] * T + i[None, :], scores)


@triton.jit
def inverse(
    overlap, beta, out, tokens, chunks,
    BY_ROW: tl.constexpr, T: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(1 + lower)⁻¹, lower = diag(beta) overlap (BY_ROW) or overlap diag(beta). A program a chunk.

    By blocks twice as large each time: of [[A, 0], [C, B]] it is [[A⁻¹, 0], [−B⁻¹ C A⁻¹, B⁻¹]].
    """
    at = tl.program_id(0)
    i = tl.arange(0, T)
    rows = at % chunks * T + i
    strength = tl.load(beta + (at // chunks).to(tl.int64) * tokens + rows, rows < tokens, other=0)
    lower = square(overlap, at, i, T)
    if BY_ROW:
        lower *= strength[:, None]
    else:
        lower *= strength[None, :]
    # Of 2 × 2 blocks with ones on the diagonal; then log₂ T products, where rows by turns would be
    # T
    x = tl.where(i[:, None] == i[None, :], 1.0, 0.0) - tl.where(corner(i, 1), lower, 0.0)
    half = 2
    while half < T:
        part = tl.where(corner(i, half), lower, 0.0)
        right = tl.dot(part, x, input_precision=PRECISION)
        x -= tl.dot(x, right, input_precision=PRECISION)
        half *= 2
    tl.store(out + at.to(tl.int64) * T * T + i[:, None] * T + i[None, :], x)


@triton.jit
def walk(
    flow, value, inverses, memory, states, news, last, sizes,
    KIND: tl.constexpr, DELTA: tl.constexpr, T: tl.constexpr, F: tl.constexpr, V: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The state before each chunk and after the last; with the delta rule r, too (news).

    A program for each block of F features (all of them with the delta rule) and V columns of a
    state: it holds its part in registers from the first chunk to the last.
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
    key = flow.key + n * tokens * features
    value += n * tokens * sizes.v_dim
    decay = flow.decay + n * tokens * sizes.decay_width
    beta = flow.beta + n * tokens
    news += n * tokens * columns
    states += n * chunks * features * columns
    f_in = f < features
    state = tile(memory + n * features * columns, f, f_in, v, columns)
    for chunk in range(chunks):
        # Before the chunk: with it `read` computes all chunks side by side
        put(states, state, f, f_in, v, columns)
        states += features * columns
        rows = chunk * T + i
        row_in = rows < tokens
        k = tile(key, rows, row_in, f, features)
        start, end, through = factors(decay, rows, i, tokens, f, features, KIND, T)
        new = written(value, beta, rows, row_in, v, sizes.v_dim, columns, False)
        if DELTA:
            # What the state already answers to each key is taken from its value: only the rest is
            # written
            new -= tl.dot(k * start, state, input_precision=PRECISION)
            by_chunk = square(inverses, n * chunks + chunk, i, T)
            new = tl.dot(by_chunk, new, input_precision=PRECISION)
            put(news, new, rows, row_in, v, columns)
            new *= tl.load(beta + rows, mask=row_in, other=0)[:, None]
        added = tl.dot(tl.trans(k * end), new, input_precision=PRECISION)
        state = state * through + added
    put(last + n * features * columns, state, f, f_in, v, columns)


@triton.jit
def read(
    flow, value, scores, states, out, sizes,
    KIND: tl.constexpr, DELTA: tl.constexpr, T: tl.constexpr, F: tl.constexpr, V: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """What the queries of a chunk read in V columns. value: r with the delta rule."""
    tokens = sizes.tokens
    features = sizes.features
    columns = sizes.columns
    chunks = sizes.chunks
    v_dim = sizes.v_dim
    at = tl.program_id(0)
    n = (at // (chunks * sizes.v_blocks)).to(tl.int64)
    chunk = at // sizes.v_blocks % chunks
    v = at % sizes.v_blocks * V + tl.arange(0, V)
    i = tl.arange(0, T)
    rows = chunk * T + i
    row_in = rows < tokens
    mine = n // sizes.group
    decay = flow.decay + mine * tokens * sizes.decay_width
    states += (mine * chunks + chunk) * features * columns
    u = written(
        value + mine * tokens * v_dim,
        flow.beta + mine * tokens,
        rows,
        row_in,
        v,
        v_dim,
        columns,
        DELTA,
    )
    mixed = tl.dot(square(scores, n * chunks + chunk, i, T), u, input_precision=PRECISION)
    for first in range(0, features, F):
        f = first + tl.arange(0, F)
        q = tile(flow.query + n * tokens * features, rows, row_in, f, features)
        start, _, _ = factors(decay, rows, i, tokens, f, features, KIND, T)
        state = tile(states, f, f < features, v, columns)
        mixed += tl.dot(q * start, state, input_precision=PRECISION)
    put(out + n * tokens * columns, mixed, rows, row_in, v, columns)
