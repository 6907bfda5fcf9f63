// Finding nodes by address, label, name, note or group.
import { fill, h } from "./dom.js";

export function search(app) {
  const query = app.searchBox.value.trim().toLowerCase();
  const { graph, influence, masks } = app.main;
  const { doc } = app.store;
  app.matches = [];
  if (query) {
    const grouped = new Map(doc.groups.flatMap(({ name, members }) => members.map((member) => [member, name])));
    for (let n = 0; n < graph.count; n++) {
      const name = graph.names[n];
      const words = [name, graph.labels[n], doc.names[name], doc.notes[name], grouped.get(name)];
      if (words.some((word) => word?.toLowerCase().includes(query))) app.matches.push(n);
    }
    app.matches.sort((a, b) => masks.nodes[b] - masks.nodes[a] || influence[b] - influence[a]);
  }
  app.chosen = 0;
  fill(app.results, app.matches.slice(0, 12).map((node, place) => h("li", { class: "row", "data-node": graph.names[node], "aria-selected": String(place === 0),
    onpointerdown: (event) => { event.preventDefault(); take(app, node); }, onpointerenter: () => app.point(node), onpointerleave: () => app.point(null) },
  app.panel.nodeName(node, 30), masks.nodes[node] ? null : h("span", { class: "quiet" }, "hidden"))),
  query && !app.matches.length ? h("li", { class: "quiet" }, "Nothing found.") : null);
  app.results.hidden = !query;
}

export function take(app, node) {
  app.results.hidden = true;
  app.searchBox.blur();
  app.point(null);
  app.select(node);
}

export function searchKey(app, event) {
  event.stopPropagation();
  if (event.key === "Escape") {
    app.searchBox.value = "";
    app.results.hidden = true;
    app.searchBox.blur();
  }
  const shown = Math.min(12, app.matches?.length ?? 0);
  if (!shown) return;
  if (event.key === "Enter") return take(app, app.matches[app.chosen]);
  if (event.key === "ArrowDown" || event.key === "ArrowUp") {
    event.preventDefault();
    app.chosen = (app.chosen + (event.key === "ArrowDown" ? 1 : shown - 1)) % shown;
    [...app.results.children].forEach((row, i) => row.setAttribute("aria-selected", String(i === app.chosen)));
    app.point(app.matches[app.chosen]);
  }
}
