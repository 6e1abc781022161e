// A recording in a notebook: the page in a frame, its questions sent to the kernel (anywidget).

function render({ model, el }) {
  const frame = document.createElement("iframe");
  frame.title = "regard view";
  Object.assign(frame.style, { width: "100%", height: `${model.get("height")}px`, border: "0",
    resize: "vertical", overflow: "hidden", display: "block" });
  const waiting = new Map();
  let last = 0;
  const heard = (said, buffers) => {
    const question = waiting.get(said?.id);
    if (!question) return;
    if (said.more) return question.got(buffers[0]);
    waiting.delete(said.id);
    if ("error" in said) question.refuse(said.error);
    else question.done(said.answer);
  };
  /** Ask the kernel; `got` is called with the bytes of each tile. */
  frame.bridge = (path, given, got, signal) => new Promise((done, refuse) => {
    const id = ++last;
    waiting.set(id, { done, refuse, got: (view) => got?.(view.buffer.slice(view.byteOffset, view.byteOffset + view.byteLength)) });
    signal?.addEventListener("abort", () => {
      if (!waiting.delete(id)) return;
      model.send({ id, drop: true });
      refuse(null);
    });
    model.send({ id, path, given });
  });
  model.on("msg:custom", heard);
  frame.srcdoc = model.get("page");
  el.append(frame);
  return () => {
    model.off("msg:custom", heard);
    for (const [id] of waiting) model.send({ id, drop: true });
    frame.remove();
  };
}

export default { render };
