// Reads what the file holds and builds the page.
import "./style.css";
import { inflateSync, strFromU8 } from "fflate";
import { App } from "./app.js";
import { fromBase64, readGraph } from "./data.js";
import { listen } from "./keys.js";
import { thumbnailBox } from "./maps.js";
import { join } from "./notebook.js";
import { prune } from "./prune.js";

const text = (id) => document.getElementById(id)?.textContent.trim();
const graphs = {};
for (const [key, id] of [["a", "graph"], ["b", "graph-b"], ["difference", "graph-difference"]]) {
  if (text(id)) graphs[key] = readGraph(text(id));
}
const extras = JSON.parse(strFromU8(inflateSync(fromBase64(text("extras")))));
const app = new App(graphs, extras);
app.build(document.getElementById("viewer"));
listen(app);
join(app);
// The page's own state and functions, for the console, for tests and for benchmarks.
app.tools = { readGraph, prune, thumbnailBox };
window.difffract = app;
