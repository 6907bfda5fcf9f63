// What leaves the page and comes back: figures as SVG and PNG, groups as .groups.json.
import { download } from "./dom.js";
import { paint } from "./painter.js";
import { SHAPES } from "./store.js";
import { SvgContext } from "./svg.js";

/** Returns the drawing as SVG text. */
export function svgOf(scene) {
  const { frame, look } = scene;
  const context = new SvgContext(frame.width, frame.height);
  paint(context, look, frame);
  return context.toString();
}

/** Returns the drawing as a PNG of three pixels to one on the screen. */
export function pngOf(scene, scale = 3) {
  const { frame, look } = scene;
  const canvas = document.createElement("canvas");
  canvas.width = Math.round(frame.width * scale);
  canvas.height = Math.round(frame.height * scale);
  const ctx = canvas.getContext("2d");
  ctx.setTransform(scale, 0, 0, scale, 0, 0);
  paint(ctx, look, frame);
  return new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
}

/** Returns what a person made of the graph as the content of a groups file. */
export function groupsDocument(identity, doc) {
  return {
    format: "difffract-groups",
    format_version: 1,
    graph: identity,
    groups: Object.fromEntries(doc.groups.map(({ name, members }) => [name, members])),
    names: doc.names,
    notes: doc.notes,
    pinned: doc.pinned,
  };
}

/** Returns a function from a name of a groups file to the names in a graph that it stands for: itself, or, where one of
 * the two is summed over positions and the other is not, the sum or the node at every position; itself if none is there. */
function namesIn(graph) {
  const summed = (name) => name.replace(/@(img|txt)?\d+(?=#|$)/, (_, side) => (side ? `@${side}` : ""));
  const every = new Map();
  for (const name of graph.names) {
    const key = summed(name);
    if (!every.has(key)) every.set(key, []);
    every.get(key).push(name);
  }
  return (name) => (graph.number.has(name) ? [name] : every.get(graph.by_position ? name : summed(name)) ?? [name]);
}

/** Reads the text of a groups file of a graph; throws one sentence if it is none, or of another graph. */
export function readGroups(text, graph) {
  let stored;
  try {
    stored = JSON.parse(text);
  } catch {
    throw new Error("This file is not JSON; open a .groups.json that was saved here.");
  }
  if (stored?.format !== "difffract-groups" || stored.format_version !== 1) {
    throw new Error("This file does not hold groups; open a .groups.json that was saved here.");
  }
  if (stored.graph?.fingerprint !== graph.identity.fingerprint) {
    throw new Error("These groups belong to another graph; open the ones that were saved from this graph.");
  }
  const groups = Object.entries(stored.groups ?? {}).map(([name, members]) => ({ name, members }));
  const { names = {}, notes = {}, pinned = [] } = stored;
  for (const [key, value] of Object.entries({ groups, names, notes, pinned })) {
    if (!SHAPES[key](value)) throw new Error(`This file is damaged at ${key}; open a .groups.json that was saved here.`);
  }
  const membersOf = namesIn(graph);
  const all = (listed) => [...new Set(listed.flatMap(membersOf))];
  const keyed = (texts) => Object.fromEntries(Object.entries(texts).flatMap(([name, text]) => membersOf(name).map((one) => [one, text])));
  return {
    groups: groups.map(({ name, members }) => ({ name, members: all(members) })),
    names: keyed(names),
    notes: keyed(notes),
    pinned: all(pinned),
  };
}

/** Sends groups to the server that gave the page, or downloads them; returns what to tell. */
export async function saveGroups(name, documentToSave, server) {
  const text = `${JSON.stringify(documentToSave, null, 1)}\n`;
  if (!server) {
    download(`${name}.groups.json`, text, "application/json");
    return `Saved as ${name}.groups.json in your downloads.`;
  }
  const answer = await fetch("groups", { method: "POST", body: text, headers: { "Content-Type": "application/json", "X-Token": server.token } });
  const sentence = await answer.text();
  if (!answer.ok) throw new Error(sentence);
  return sentence;
}
