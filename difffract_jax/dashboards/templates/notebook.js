// The notebook's side of a page. `initialize` runs once in a front end, with or without a view: it listens to the pages
// that carry the model's key, wherever they lie in the notebook, and tells them what Python sets. `render` shows a page.
const NAMES = ["groups", "selected", "pruning"];

function initialize({ model }) {
  const key = model.get("key");
  const pages = new Set();
  let sender = null;
  const tell = (page) => page.postMessage({ difffract: key, groups: model.get("groups") }, "*");
  const receive = ({ source, data }) => {
    if (!source || data?.difffract !== key) return;
    pages.add(source);
    if (data.ready) return tell(source);
    sender = source; // which knows it already, and may have gone on
    for (const name of NAMES) if (name in data) model.set(name, data[name]);
    sender = null;
    model.save_changes();
  };
  const changed = () => {
    for (const page of pages) if (page !== sender) tell(page);
  };
  window.addEventListener("message", receive);
  model.on("change:groups", changed);
  // Pages that were there before this model was.
  for (const frame of document.querySelectorAll(`iframe[data-difffract="${key}"]`)) {
    if (!frame.contentWindow) continue;
    pages.add(frame.contentWindow);
    tell(frame.contentWindow);
  }
  return () => {
    window.removeEventListener("message", receive);
    model.off("change:groups", changed);
  };
}

function render({ model, el }) {
  const frame = document.createElement("iframe");
  frame.setAttribute("sandbox", "allow-scripts allow-downloads");
  frame.title = model.get("title");
  Object.assign(frame.style, { width: "100%", height: `${model.get("height")}px`, border: "0" });
  const load = () => { frame.srcdoc = model.get("page"); };
  load();
  model.on("change:page", load);
  el.append(frame);
  return () => {
    model.off("change:page", load);
    frame.remove();
  };
}

export default { initialize, render };
