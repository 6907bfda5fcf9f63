// A graph ready to be drawn: its influence, what pruning keeps, where nodes stand, how strong edges look.
import { columnShares, influenceOf, prune, reach } from "./prune.js";
import { layOut } from "./layout.js";
import { makeAtlas } from "./maps.js";

export class View {
  constructor(graph) {
    this.graph = graph;
    this.influence = influenceOf(graph);
    this.shares = columnShares(graph);
    const reached = reach(graph, this.shares);
    let most = 0;
    const scores = new Float64Array(graph.edges);
    for (let e = 0; e < graph.edges; e++) most = Math.max(most, (scores[e] = this.shares[e] * reached[graph.edge_target[e]]));
    this.strength = Float32Array.from(scores, (score) => (most ? Math.sqrt(score / most) : 0));
    this.ranked = Int32Array.from(scores.keys()).sort((a, b) => scores[b] - scores[a] || a - b);
    this.mostInfluence = 0;
    for (let n = 0; n < graph.count; n++) if (!graph.isTarget[n]) this.mostInfluence = Math.max(this.mostInfluence, this.influence[n]);
  }

  /** Computes what is kept at the thresholds of `doc`; pinned nodes stay. */
  prune(doc) {
    const keep = doc.pinned.map((name) => this.graph.number.get(name)).filter((node) => node !== undefined);
    this.masks = prune(this.graph, doc, keep);
    this.counts = { nodes: 0, edges: 0 };
    for (const kept of this.masks.nodes) this.counts.nodes += kept;
    for (const kept of this.masks.edges) this.counts.edges += kept;
  }

  /** Places the nodes that are shown, unless they stand already. */
  layOut(unfolded, aspect) {
    const key = `${unfolded} ${aspect.toFixed(2)} ${this.masks.nodes.join("")}`;
    if (this.placed === key) return;
    this.placed = key;
    this.layout = layOut(this.graph, this.masks.nodes, unfolded, aspect);
  }

  /** Returns what a scene draws. */
  look({ colours, doc, title, image, stepImage, scale = 1 }) {
    const { graph, masks } = this;
    if (this.atlasOf !== colours) {
      this.atlasOf = colours;
      this.atlas = makeAtlas(graph, colours.heat);
    }
    const shownNodes = [];
    for (let n = 0; n < graph.count; n++) if (masks.nodes[n]) shownNodes.push(n);
    const labelled = shownNodes.slice().sort((a, b) => graph.isTarget[b] - graph.isTarget[a] || this.influence[b] - this.influence[a]);
    const edges = Array.from(this.ranked).filter((e) => masks.edges[e]);
    const number = (name) => graph.number.get(name);
    return {
      graph, colours, title, image, stepImage, scale,
      layout: this.layout,
      influence: this.influence,
      most: this.mostInfluence || 1,
      strength: this.strength,
      shownNodes,
      labelled: labelled.slice(0, 220),
      strongest: edges,
      shownEdges: edges.slice().reverse(),
      nodeShown: masks.nodes,
      edgeShown: masks.edges,
      atlas: this.atlas,
      pinned: new Set(doc.pinned.map(number).filter((node) => node !== undefined)),
      groups: doc.groups.map((group) => ({ name: group.name, nodes: group.members.map(number).filter((node) => node !== undefined) })),
    };
  }
}
