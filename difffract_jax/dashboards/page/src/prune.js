// Influence and pruning, the same numbers in the same order as difffract_jax/graphs/pruning.py: sums run in the order
// of the edges, ranks are stable, so that both keep the same nodes and edges.
import { FEATURE, INPUT } from "./data.js";

const ROUNDING = 1e-9;

/** Returns every edge's absolute attribution over the sum of those into its target; 0 for edges that are not kept. */
export function columnShares(graph, kept) {
  const { edge_target: target, edge_attribution: value } = graph;
  const total = new Float64Array(graph.count);
  const shares = new Float64Array(graph.edges);
  for (let e = 0; e < graph.edges; e++) {
    const size = kept && !kept[e] ? 0 : Math.abs(value[e]);
    shares[e] = size;
    total[target[e]] += size;
  }
  for (let e = 0; e < graph.edges; e++) shares[e] = total[target[e]] > 0 ? shares[e] / total[target[e]] : 0;
  return shares;
}

/** Returns the edges by falling level of their targets, in the order of the file within one; made once a graph. */
function walkOrder(graph) {
  if (graph.walk) return graph.walk;
  const level = graph.node_level;
  const order = Int32Array.from({ length: graph.edges }, (_, e) => e);
  order.sort((a, b) => level[graph.edge_target[b]] - level[graph.edge_target[a]] || a - b);
  return (graph.walk = order);
}

/** Returns w + B w: every node's weight and influence on the weighted targets, over all paths. */
export function reach(graph, shares) {
  const { edge_source: source, edge_target: target, node_level: level } = graph;
  const result = Float64Array.from(graph.node_root);
  const added = new Float64Array(graph.count);
  const order = walkOrder(graph);
  let begin = 0;
  while (begin < order.length) {
    const now = level[target[order[begin]]];
    let end = begin;
    for (; end < order.length && level[target[order[end]]] === now; end++) {
      const e = order[end];
      added[source[e]] += shares[e] * result[target[e]];
    }
    for (let i = begin; i < end; i++) {
      const s = source[order[i]];
      result[s] += added[s];
      added[s] = 0;
    }
    begin = end;
  }
  return result;
}

/** Returns B w of a graph, over all its edges; computed once. */
export function influenceOf(graph) {
  if (graph.influence) return graph.influence;
  const reached = reach(graph, columnShares(graph));
  for (let n = 0; n < graph.count; n++) reached[n] -= graph.node_root[n];
  return (graph.influence = reached);
}

/** Marks the largest scores: the fewest that hold the threshold's share of their sum, and ties with the last. */
export function largest(scores, threshold) {
  const marked = new Uint8Array(scores.length).fill(1);
  if (threshold === 1 || !scores.length) return marked;
  const descending = Float64Array.from(scores).sort().reverse();
  const total = new Float64Array(descending.length);
  let sum = 0;
  for (let i = 0; i < descending.length; i++) total[i] = sum += descending[i];
  const wanted = (threshold - ROUNDING) * sum;
  let last = 0;
  while (last < total.length && total[last] < wanted) last++;
  last = Math.min(last, scores.length - 1);
  const least = descending[last] * (1 - ROUNDING);
  for (let i = 0; i < scores.length; i++) marked[i] = scores[i] >= least ? 1 : 0;
  return marked;
}

/** Marks the largest scores, as few as hold the threshold's share of their sum; all at threshold 1. */
export function topShare(scores, threshold) {
  const chosen = new Uint8Array(scores.length).fill(1);
  if (!(threshold < 1) || !scores.length) return chosen;
  const order = Array.from(scores.keys()).sort((a, b) => scores[b] - scores[a] || a - b);
  const total = [];
  let sum = 0;
  for (const i of order) total.push((sum += scores[i]));
  let last = 0;
  while (last < total.length && total[last] < threshold * sum) last++;
  for (let i = last + 1; i < order.length; i++) chosen[order[i]] = 0;
  return chosen;
}

/** Returns masks of the nodes and edges that pruning keeps; `keep` lists nodes that stay in any case. */
export function prune(graph, { mode, node_threshold, edge_threshold }, keep = []) {
  const rule = mode === "difffract" ? byStream : inOneList;
  return rule(graph, influenceOf(graph), node_threshold, edge_threshold, keep);
}

function between(graph, nodes) {
  const edges = new Uint8Array(graph.edges);
  for (let e = 0; e < graph.edges; e++) edges[e] = nodes[graph.edge_source[e]] & nodes[graph.edge_target[e]];
  return edges;
}

function edgeScores(graph, kept) {
  const scores = columnShares(graph, kept);
  const reached = reach(graph, scores);
  for (let e = 0; e < graph.edges; e++) scores[e] *= reached[graph.edge_target[e]];
  return scores;
}

function inOneList(graph, influence, nodeThreshold, edgeThreshold, keep) {
  const fixed = new Uint8Array(graph.count);
  for (let n = 0; n < graph.count; n++) fixed[n] = graph.node_kind[n] === INPUT || graph.isTarget[n] ? 1 : 0;
  for (const n of keep) fixed[n] = 1;
  const nodes = largest(influence, nodeThreshold);
  for (let n = 0; n < graph.count; n++) nodes[n] |= fixed[n];
  const edges = between(graph, nodes);
  const ranked = Int32Array.from(edges.keys()).filter((e) => edges[e]);
  const scores = edgeScores(graph, edges);
  const marked = largest(Float64Array.from(ranked, (e) => scores[e]), edgeThreshold);
  ranked.forEach((e, i) => (edges[e] = marked[i]));
  for (;;) {
    const hasOut = new Uint8Array(graph.count);
    const hasIn = new Uint8Array(graph.count);
    for (let e = 0; e < graph.edges; e++) {
      if (edges[e]) hasOut[graph.edge_source[e]] = hasIn[graph.edge_target[e]] = 1;
    }
    let changed = false;
    for (let n = 0; n < graph.count; n++) {
      const dangles = !fixed[n] && (!hasOut[n] || (graph.node_kind[n] === FEATURE && !hasIn[n]));
      if (nodes[n] && dangles) {
        nodes[n] = 0;
        changed = true;
      }
    }
    if (!changed) return { nodes, edges };
    for (let e = 0; e < graph.edges; e++) edges[e] &= nodes[graph.edge_source[e]] & nodes[graph.edge_target[e]];
  }
}

function byStream(graph, influence, nodeThreshold, edgeThreshold, keep) {
  const streams = [...new Set(graph.node_stream)].sort((a, b) => a - b);
  const nodes = new Uint8Array(graph.count).fill(1);
  const isFeature = (n) => graph.node_kind[n] === FEATURE && !graph.isTarget[n];
  for (const stream of streams) {
    const mine = [];
    for (let n = 0; n < graph.count; n++) if (isFeature(n) && graph.node_stream[n] === stream) mine.push(n);
    const marked = topShare(Float64Array.from(mine, (n) => influence[n]), nodeThreshold);
    mine.forEach((n, i) => (nodes[n] = marked[i]));
  }
  for (const n of keep) nodes[n] = 1;
  const left = between(graph, nodes);
  const scores = edgeScores(graph, left);
  const edges = new Uint8Array(graph.edges);
  for (const stream of streams) {
    const mine = [];
    for (let e = 0; e < graph.edges; e++) {
      if (left[e] && graph.node_stream[graph.edge_source[e]] === stream) mine.push(e);
    }
    const marked = topShare(Float64Array.from(mine, (e) => scores[e]), edgeThreshold);
    mine.forEach((e, i) => (edges[e] = marked[i]));
  }
  const joined = new Uint8Array(graph.count);
  for (let e = 0; e < graph.edges; e++) {
    if (edges[e]) joined[graph.edge_source[e]] = joined[graph.edge_target[e]] = 1;
  }
  for (const n of keep) joined[n] = 1;
  for (let n = 0; n < graph.count; n++) {
    if (nodes[n] && graph.node_kind[n] === FEATURE && !joined[n] && !graph.isTarget[n]) nodes[n] = 0;
  }
  return { nodes, edges };
}
