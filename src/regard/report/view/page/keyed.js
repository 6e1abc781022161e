// Lists that are drawn again on every answer, of elements that stay the same ones.

/**
 * Make the children of `parent` show `items`, in order. What shows an item, by its key, stays the
 * same element: what is under the pointer can be clicked, and what has the focus keeps it.
 */
function keyed(parent, items, key, build, update) {
  const before = (parent.keyed ??= new Map());
  const now = new Map();
  for (const item of items) {
    const name = String(key(item));
    const element = before.get(name) ?? build(item);
    now.set(name, element);
    update(element, item);
  }
  for (const [name, element] of before) if (!now.has(name)) element.remove();
  const focused = document.activeElement;
  [...now.values()].forEach((element, i) => {
    if (parent.children[i] !== element) parent.insertBefore(element, parent.children[i] ?? null);
  });
  if (focused !== document.activeElement && parent.contains(focused)) focused.focus({ preventScroll: true });
  parent.keyed = now;
}

export { keyed };
