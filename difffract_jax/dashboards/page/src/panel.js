// The column beside the drawing: what the circuit adds up to, the node in hand, and the groups.
import { FEATURE, SCORE, branchOf, edgesOf, mapOf } from "./data.js";
import { cut, fill, h, number, percent } from "./dom.js";
import { showAccount } from "./account.js";
import { pin, rename, annotate, addToGroup, renameGroup, removeGroup, save, loadGroups } from "./edits.js";

const KINDS = {
  feature: "feature", error: "error of the transcoder", input: "input", output: "target", rest: "features not followed",
  score: "attention score", modulation: "shift, scale or gate", word: "word of the prompt, as the pooled vector has it",
};
const MOST_ROWS = 60;

export class Panel {
  constructor(app) {
    this.app = app;
    this.account = h("div", { class: "account-box" });
    this.top = h("div", { class: "top" });
    this.card = h("div", { class: "card", "aria-live": "polite" });
    this.groups = h("div", { class: "groups" });
    this.facts = h("details", { class: "facts" });
    this.headline = h("h2", {});
    const tabs = [["circuit", "Circuit"], ["node", "Node"], ["groups", "Groups"]];
    this.tabs = h("div", { class: "tabs", role: "tablist" }, tabs.map(([key, name]) =>
      h("button", { type: "button", role: "tab", id: `tab-${key}`, "data-tab": key, onclick: () => this.open(key) }, name)));
    this.parts = {
      circuit: h("section", { role: "tabpanel", "aria-labelledby": "tab-circuit" }, this.headline, this.account,
        h("h3", {}, "Most influential"), this.top, this.facts),
      node: h("section", { role: "tabpanel", "aria-labelledby": "tab-node" }, this.card),
      groups: h("section", { role: "tabpanel", "aria-labelledby": "tab-groups" }, this.groups),
    };
    this.element = h("div", { class: "panel" }, this.tabs, Object.values(this.parts));
    this.open("circuit");
  }

  open(key) {
    this.opened = key;
    for (const [name, part] of Object.entries(this.parts)) part.hidden = name !== key;
    for (const tab of this.tabs.children) tab.setAttribute("aria-selected", String(tab.dataset.tab === key));
  }

  /** Fills in everything that hangs on the graph and its pruning. */
  show() {
    const { graph, masks } = this.app.main;
    const [{ name, why }, ...others] = graph.targets;
    const more = others.length ? ` and ${others.length} more` : "";
    if (this.app.store.view.show === "difference") fill(this.headline, "First minus second: ", cut(name + more, 80, { class: "name" }));
    else fill(this.headline, cut((more ? `Why ${name}` : why) + more, 120, { class: "name" }));
    showAccount(this.account, graph, this.app.account());
    this.showTop(graph, masks);
    fill(this.facts, h("summary", {}, "Where this graph comes from"),
      h("dl", {}, graph.facts.map(([key, value]) => [h("dt", {}, key), h("dd", {}, cut(value, 300))])));
    this.showCard();
    this.showGroups();
  }

  showTop(graph, masks) {
    const { influence } = this.app.main;
    const nodes = [];
    for (let n = 0; n < graph.count; n++) if (masks.nodes[n] && !graph.isTarget[n] && graph.node_kind[n] === FEATURE) nodes.push(n);
    nodes.sort((a, b) => influence[b] - influence[a] || a - b);
    const most = influence[nodes[0]] || 1;
    fill(this.top, nodes.length ? h("table", {}, h("tbody", {}, nodes.slice(0, 12).map((n) =>
      h("tr", { class: "row", "data-node": graph.names[n], tabindex: "0", ...this.rowEvents(n) },
        h("td", {}, this.nodeName(n)),
        h("td", { class: "share" }, h("span", { class: "meter", style: { width: `${(100 * influence[n]) / most}%` } })),
        h("td", { class: "figure" }, percent(influence[n])))))) : h("p", { class: "quiet" }, "No feature is left at these thresholds."));
  }

  rowEvents(node) {
    return {
      onclick: () => this.app.select(node),
      onkeydown: (event) => { if (event.key === "Enter") this.app.select(node); },
      onpointerenter: () => this.app.point(node),
      onpointerleave: () => this.app.point(null),
    };
  }

  /** Returns how a node is called in tables: a dot of its colour, its own name or label, and its address. */
  nodeName(node, most = 34) {
    const { graph } = this.app.main;
    const title = this.app.title(node);
    const name = graph.names[node];
    const kind = graph.isTarget[node] ? "output" : graph.kinds[graph.node_kind[node]];
    return h("span", { class: "node-name" },
      h("span", { class: `mark ${kind} ${graph.streams[graph.node_stream[node]]} ${branchOf(graph, node)}`.trim() }),
      cut(title, most, { class: title === name ? "address" : "label" }),
      title === name ? null : cut(name, 26, { class: "address quiet" }));
  }

  showCard() {
    const node = this.app.selected();
    if (node === null) {
      fill(this.card, h("p", { class: "quiet" }, "Click a node to see what enters it and where it leads. ",
        "Arrow keys walk along the strongest edges; / searches; ? lists all keys."));
      return;
    }
    const { graph, influence } = this.app.main;
    const name = graph.names[node];
    const { doc } = this.app.store;
    const kind = graph.isTarget[node] ? "output" : graph.kinds[graph.node_kind[node]];
    const facts = [["influence on the target", percent(influence[node])]];
    if (graph.node_kind[node] === FEATURE) facts.push(["largest value", number(graph.node_value[node])]);
    // The rest of a block's scores is one node without a value of its own.
    if (graph.node_kind[node] === SCORE && !name.startsWith("other scores ")) facts.push(["score, less the query's mean", number(graph.node_value[node])]);
    if (branchOf(graph, node)) facts.push(["branch of guidance", branchOf(graph, node)]);
    if (mapOf(graph, node)[0].length) facts.push(["active at", `${mapOf(graph, node)[0].length} positions`]);
    fill(this.card,
      h("header", {}, h("h2", {}, cut(this.app.title(node), 80)),
        h("p", { class: "quiet" }, cut(name, 60, { class: "address" }), ` · ${KINDS[kind] ?? kind}`,
          graph.labels[node] && doc.names[name] ? [" · ", cut(graph.labels[node], 60)] : null)),
      h("div", { class: "actions" },
        this.action("pin", doc.pinned.includes(name) ? "Unpin" : "Pin", "p", () => pin(this.app, node)),
        this.action("group", "Group…", "g", () => addToGroup(this.app, node)),
        this.action("path", this.app.path ? "Hide path" : "Path to target", "t", () => this.app.togglePath()),
        this.app.pageOf(node) ? this.action("page", "Feature page", "o", () => this.app.openPage(node)) : null),
      h("label", { class: "field" }, h("span", {}, "Name"),
        h("input", { class: "rename", type: "text", value: doc.names[name] ?? "", placeholder: graph.labels[node] || name, maxlength: "200", dir: "auto",
          onchange: (event) => rename(this.app, node, event.target.value) })),
      h("label", { class: "field" }, h("span", {}, "Note"), this.noteBox(node, doc.notes[name] ?? "")),
      h("dl", { class: "numbers" }, facts.map(([key, value]) => [h("dt", {}, key), h("dd", {}, value)])),
      this.app.path ? this.pathBox(this.app.path) : null,
      this.ownAccount(node),
      this.edgeTable("What enters it", node, graph.into, graph.edge_source),
      this.edgeTable("Where it leads", node, graph.outOf, graph.edge_target));
  }

  noteBox(node, text) {
    const box = h("textarea", { class: "note", rows: "2", placeholder: "What you think it does", maxlength: "20000", dir: "auto",
      onchange: (event) => annotate(this.app, node, event.target.value) });
    box.value = text;
    return box;
  }

  action(key, name, shortcut, onclick) {
    return h("button", { type: "button", "data-action": key, title: `${name} (${shortcut})`, onclick }, name);
  }

  pathBox(path) {
    return h("div", { class: "path-box" }, h("h3", {}, "Strongest path to the target"),
      h("p", { class: "quiet" }, `It carries ${percent(path.share)} of the target's edges, by shares multiplied along it.`),
      h("ol", {}, path.nodes.map((node) => h("li", { class: "row", "data-node": this.app.main.graph.names[node], ...this.rowEvents(node) }, this.nodeName(node)))));
  }

  /** Says how an expanded node's own value adds up. */
  ownAccount(node) {
    const { graph } = this.app.main;
    const place = graph.account.get(node);
    if (place === undefined) return null;
    const u = graph.target_preactivation[place];
    if (!Number.isFinite(u)) return null;
    return h("p", { class: "quiet own" }, `Its ${graph.isTarget[node] ? "value" : "pre-activation"} ${number(u)} = edges ${number(graph.target_sum[place])} + bias ${number(graph.target_bias[place])}.`);
  }

  edgeTable(title, node, list, other) {
    const { graph, masks, shares } = this.app.main;
    const edges = [...edgesOf(list, node)].sort((a, b) => Math.abs(graph.edge_attribution[b]) - Math.abs(graph.edge_attribution[a]) || a - b);
    const rows = edges.slice(0, MOST_ROWS);
    const most = Math.max(...rows.map((e) => shares[e]), 1e-12);
    return h("div", { class: "edge-table", "data-table": title === "What enters it" ? "in" : "out" },
      h("h3", {}, title, h("span", { class: "count" }, String(edges.length))),
      rows.length ? h("table", {}, h("tbody", {}, rows.map((e) => h("tr", { class: `row${masks.edges[e] ? "" : " hidden-edge"}`, "data-node": graph.names[other[e]], "data-edge": e,
        title: masks.edges[e] ? undefined : "Hidden by the sliders", tabindex: "0", ...this.rowEvents(other[e]) },
      h("td", {}, this.nodeName(other[e], 26)),
      h("td", { class: "share" }, h("span", { class: `meter ${graph.edge_attribution[e] < 0 ? "minus" : "plus"}`, style: { width: `${(100 * shares[e]) / most}%` } })),
      h("td", { class: "figure", "data-value": graph.edge_attribution[e] }, (graph.edge_attribution[e] > 0 ? "+" : "") + number(graph.edge_attribution[e])))))) :
        h("p", { class: "quiet" }, "None."),
      edges.length > rows.length ? h("p", { class: "quiet" }, `and ${edges.length - rows.length} weaker ones`) : null);
  }

  showGroups() {
    const { store, main } = this.app;
    const { groups, pinned, notes } = store.doc;
    const item = (name) => {
      const node = main.graph.number.get(name);
      return h("li", { class: "row", "data-node": name, ...(node === undefined ? {} : this.rowEvents(node)) },
        node === undefined ? cut(name, 30, { class: "address quiet" }) : this.nodeName(node));
    };
    fill(this.groups,
      h("div", { class: "actions" },
        h("button", { type: "button", "data-action": "save", onclick: () => save(this.app) }, this.app.extras.server ? "Save" : "Save .groups.json"),
        h("button", { type: "button", "data-action": "load", onclick: () => loadGroups(this.app) }, "Open…"),
        h("button", { type: "button", "data-action": "new-group", onclick: () => addToGroup(this.app, this.app.selected()) }, "New group")),
      h("p", { class: "quiet" }, groups.length ? "Groups hold features that do the same. Those found automatically come first." :
        "No groups yet. Click a node, then Group; or run difffract supernodes on the graph, which finds groups."),
      groups.map((group, place) => h("div", { class: "group", "data-group": group.name },
        h("div", { class: "group-head", onpointerenter: () => this.app.pointAtGroup(place), onpointerleave: () => this.app.pointAtGroup(null) },
          h("span", { class: "swatch", style: { background: this.app.colours.groups[place % this.app.colours.groups.length] } }),
          h("input", { type: "text", "aria-label": "Name of the group", value: group.name, maxlength: "200", dir: "auto", onchange: (event) => renameGroup(this.app, place, event.target.value) }),
          h("button", { type: "button", title: "Take the group apart", "aria-label": "Take the group apart", onclick: () => removeGroup(this.app, place) }, "×")),
        h("ul", {}, group.members.slice(0, 40).map(item)))),
      pinned.length ? [h("h3", {}, "Pinned"), h("ul", { class: "pins" }, pinned.map(item))] : null,
      Object.keys(notes).length ? [h("h3", {}, "Notes"), h("ul", { class: "notes" }, Object.entries(notes).map(([name, note]) =>
        h("li", {}, item(name), h("p", {}, cut(note, 300)))))] : null);
  }
}
