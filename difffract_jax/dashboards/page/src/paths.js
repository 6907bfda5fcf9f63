// The strongest path between two nodes: the one along which the product of the edges' shares of their targets is largest.
import { edgesOf } from "./data.js";

/** Returns { nodes, edges, share } of the strongest path over the edges that are kept; null if there is none. */
export function strongestPath(graph, shares, kept, source, target) {
  const best = new Float64Array(graph.count);
  const next = new Int32Array(graph.count).fill(-1);
  best[target] = 1;
  const order = Int32Array.from({ length: graph.count }, (_, n) => n);
  order.sort((a, b) => graph.node_level[b] - graph.node_level[a] || a - b);
  for (const node of order) {
    if (!best[node]) continue;
    for (const e of edgesOf(graph.into, node)) {
      const product = shares[e] * best[node];
      if (kept[e] && product > best[graph.edge_source[e]]) {
        best[graph.edge_source[e]] = product;
        next[graph.edge_source[e]] = e;
      }
    }
  }
  if (!best[source] || source === target) return null;
  const nodes = [source];
  const edges = [];
  for (let node = source; node !== target; ) {
    edges.push(next[node]);
    node = graph.edge_target[next[node]];
    nodes.push(node);
  }
  return { nodes, edges, share: best[source] };
}
