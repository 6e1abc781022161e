// A recording in a notebook: the page in a frame, its questions sent to the kernel (anywidget).

/** "light" or "dark", as the notebook around is: JupyterLab, VS Code, Colab; null where none says. */
function theme() {
  const { jpThemeLight, vscodeThemeKind } = document.body.dataset;
  const said = vscodeThemeKind ?? (jpThemeLight && (jpThemeLight === "true" ? "light" : "dark"))
    ?? document.documentElement.getAttribute("theme");
  return said ? (/dark|black/.test(said) ? "dark" : "light") : null;
}

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
  frame.theme = theme;
  const themes = new MutationObserver(() => frame.contentWindow?.dispatchEvent(new Event("theme")));
  for (const root of [document.body, document.documentElement])
    themes.observe(root, { attributes: true, attributeFilter: ["data-jp-theme-light", "data-vscode-theme-kind", "theme"] });
  frame.srcdoc = model.get("page");
  el.append(frame);
  return () => {
    model.off("msg:custom", heard);
    themes.disconnect();
    for (const [id] of waiting) model.send({ id, drop: true });
    frame.remove();
  };
}

export default { render };
