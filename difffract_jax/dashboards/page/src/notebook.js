// The page inside a notebook: what a person makes of the graph goes to the notebook's kernel, what Python sets comes back.
// Messages between the page and the frame around it carry a key, by which the notebook knows this page.
import { groupsDocument, readGroups } from "./files.js";

const PAUSE = 150; // milliseconds after the last change, so that a slider sends one message

/** Returns what the notebook is told: groups as their file has them, the node in hand, and the thresholds. */
function made(app) {
  const { mode, node_threshold, edge_threshold } = app.store.doc;
  return {
    groups: groupsDocument(app.graphs.a.identity, app.store.doc),
    selected: app.store.view.selected,
    pruning: { mode, node_threshold, edge_threshold },
  };
}

/** Joins a page to the notebook that it lies in; a page of its own is left alone. */
export function join(app) {
  const key = app.extras.notebook;
  if (!key || window.parent === window) return;
  // The frame has no origin of its own, and the notebook's is not known; the key says for whom a message is.
  const send = (what) => window.parent.postMessage({ difffract: key, ...what }, "*");
  let last = JSON.stringify(made(app));
  let waiting;
  app.store.listen(() => {
    clearTimeout(waiting);
    waiting = setTimeout(() => {
      const text = JSON.stringify(made(app));
      if (text !== last) send(JSON.parse(text));
      last = text;
    }, PAUSE);
  });
  window.addEventListener("message", ({ source, data }) => {
    if (source !== window.parent || data?.difffract !== key || !data.groups) return;
    try {
      const read = readGroups(JSON.stringify(data.groups), app.graphs.a);
      app.store.edit((doc) => Object.assign(doc, read));
      // Not sent back: it would undo what another view has done meanwhile.
      last = JSON.stringify({ ...JSON.parse(last), groups: made(app).groups });
    } catch (error) {
      app.say(error.message);
    }
  });
  send({ ready: true });
}
