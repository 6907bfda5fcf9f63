// What stands around the drawing: title, tools, legend, sliders, and the boxes that open over it.

import { SCORE } from "./data.js";
import { cut, h, short } from "./dom.js";
import { search, searchKey } from "./search.js";

export function header(app) {
  const { a, b } = app.graphs;
  const button = (key, text, title, onclick) => h("button", { type: "button", "data-action": key, title, onclick }, text);
  app.searchBox = h("input", { type: "search", class: "search", placeholder: "Search  /", "aria-label": "Search nodes", maxlength: "200",
    oninput: () => search(app), onkeydown: (event) => searchKey(app, event), onfocus: () => search(app) });
  app.results = h("ul", { class: "results", hidden: true });
  app.undoButton = button("undo", "↶", "Undo (u)", () => app.store.undo());
  app.redoButton = button("redo", "↷", "Redo (r)", () => app.store.redo());
  app.switch = b ? h("div", { class: "switch", role: "group", "aria-label": "Which graph" },
    [["a", "First"], ["b", "Second"], ["side", "Side by side"], ...(app.graphs.difference ? [["difference", "Difference"]] : [])].map(([key, name]) =>
      h("button", { type: "button", "data-show": key, title: app.graphs[key] ? short(app.graphs[key].title, 200) : name,
        onclick: () => app.store.look({ show: key, path: false }) }, name))) : null;
  return h("header", { class: "head" },
    h("div", { class: "titles" }, h("h1", {}, cut(a.title, 90)),
      h("p", { class: "prompt" }, a.prompt ? ["“", cut(a.prompt, 110), "”"] : `${a.count} nodes, ${a.edges} edges`)),
    app.switch,
    h("div", { class: "find" }, app.searchBox, app.results),
    h("div", { class: "tools" }, app.undoButton, app.redoButton,
      button("svg", "SVG", "Save the drawing as SVG", () => app.exportSvg()),
      button("png", "PNG", "Save the drawing as PNG", () => app.exportPng()),
      app.extras.notebook ? null : button("link", "Link", "Copy an address of this view (l)", () => app.copyLink()),
      button("theme", "◐", "Light or dark (d)", () => app.setTheme(!app.dark)),
      button("help", "?", "Keys (?)", () => app.help.showModal())));
}

const isGuided = (app) => Object.values(app.graphs).some((graph) => graph?.guided);
const hasScores = (app) => Object.values(app.graphs).some((graph) => graph?.node_kind.includes(SCORE));

export function legend(app) {
  const entry = (kind, name) => h("li", {}, h("span", { class: `mark ${kind}` }), name);
  return h("ul", { class: "legend", title: "Size of a node and width of an edge: how much the target hangs on it" },
    entry("feature img", "image feature"), entry("feature txt", "text feature"), entry("input img", "input"),
    entry("error img", "error"), entry("rest img", "not followed"), hasScores(app) ? entry("score", "attention") : null, entry("output", "target"),
    isGuided(app) ? entry("feature img negative", "hollow: of the negative prompt") : null,
    h("li", {}, h("span", { class: "mark edge plus" }), (app.raises = h("span", {}))),
    h("li", {}, h("span", { class: "mark edge minus" }), (app.lowers = h("span", {}))));
}

export function zoomButtons(app) {
  const zoom = (key, text, title, act) => h("button", { type: "button", "data-action": key, title, "aria-label": title, onclick: act }, text);
  const by = (factor) => () => app.activeScenes().forEach((scene) => scene.zoomBy(factor));
  return h("div", { class: "zoom" }, zoom("zoom-in", "+", "Zoom in", by(1.5)), zoom("zoom-out", "−", "Zoom out", by(1 / 1.5)),
    zoom("fit", "⤢", "Show all (f)", () => app.fit()));
}

export function controls(app) {
  const slider = (key, name, why) => {
    const input = h("input", { type: "range", min: "0.02", max: "1", step: "0.01", "data-slider": key, title: why,
      oninput: () => app.slide(key, Number(input.value)), onchange: () => app.store.settle() });
    const figure = h("output", {});
    app.sliders[key] = { input, figure };
    return h("label", { class: "slider", title: why }, h("span", {}, name), input, figure);
  };
  app.sliders = {};
  app.mode = h("select", { "aria-label": "Pruning rule", title: "standard: all nodes in one list, as circuit-tracer; difffract: per stream, errors stay",
    onchange: () => app.store.edit((doc) => { doc.mode = app.mode.value; }) }, h("option", { value: "standard" }, "standard"), h("option", { value: "difffract" }, "per stream"));
  app.counted = h("span", { class: "counted" });
  return h("div", { class: "controls" },
    slider("node_threshold", "Nodes", "Share of the influence that the nodes you see hold"),
    slider("edge_threshold", "Edges", "Share of the edge scores that the edges you see hold"), app.mode, app.counted);
}

export function foldButton(app) {
  app.fold = h("button", { type: "button", class: "fold", "data-action": "fold", title: "Steps one above another, or in one place (s)",
    onclick: () => app.store.look({ unfolded: !app.store.view.unfolded }) });
  app.fold.hidden = !Object.values(app.graphs).some((graph) => graph.steps.length > 1);
  return app.fold;
}

export function helpBox(app) {
  const keys = [["↑ ↓", "along the strongest edge, towards the target or away from it"], ["← →", "to the next node of the row"], ["/", "search"], ["p", "pin"],
    ["g", "put into a group"], ["n", "name"], ["m", "note"], ["t", "path to the target"], ["o", "feature page"], ["u, r", "undo, redo"], ["s", "unfold or stack steps"], ["f", "show all"],
    ["d", "light or dark"], ["l", "copy an address of this view"], ["Esc", "let go"]];
  app.help = h("dialog", { class: "help" }, h("h2", {}, "Keys"), h("dl", {}, keys.map(([key, what]) => [h("dt", {}, key), h("dd", {}, what)])),
    h("form", { method: "dialog" }, h("button", {}, "Close")));
  return app.help;
}

export function frameBox(app) {
  app.pageFrame = h("iframe", { title: "Page of the feature", referrerpolicy: "no-referrer", onload: () => app.sendTheme() });
  app.pageLink = h("a", { target: "_blank", rel: "noopener noreferrer" }, "Open in a tab of its own");
  app.pageDialog = h("dialog", { class: "feature-page" }, h("form", { method: "dialog" }, h("button", {}, "Close"), app.pageLink), app.pageFrame);
  return app.pageDialog;
}
