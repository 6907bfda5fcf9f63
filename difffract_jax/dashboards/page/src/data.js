// A graph as the page holds it: columns of numbers behind a JSON header, see page_data.py.
import { inflateSync, strFromU8 } from "fflate";

const TYPES = {
  uint8: Uint8Array,
  int16: Int16Array,
  int32: Int32Array,
  float32: Float32Array,
  float64: Float64Array,
};
export const FEATURE = 0;
export const ERROR = 1;
export const INPUT = 2;
export const OUTPUT = 3;
export const REST = 4;
export const SCORE = 5;
export const MODULATION = 6;
export const WORD = 7;
export const IMG = 0;
export const TXT = 1;
/** Branches of guidance, by code. */
export const BRANCHES = ["prompt", "negative"];

/** Returns the bytes of base64 text. */
export function fromBase64(text) {
  const raw = atob(text);
  const bytes = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i);
  return bytes;
}

/** Reads one graph: its header's facts, its arrays by name, and lists of edges by node. */
export function readGraph(packed) {
  const bytes = inflateSync(fromBase64(packed.trim()));
  const length = new DataView(bytes.buffer, bytes.byteOffset).getUint32(0, true);
  const header = JSON.parse(strFromU8(bytes.subarray(4, 4 + length)));
  const start = 4 + length;
  const arrays = {};
  for (const { name, type, offset, length: count } of header.arrays) {
    const Kind = TYPES[type];
    const from = bytes.byteOffset + start + offset;
    const part = bytes.buffer.slice(from, from + count * Kind.BYTES_PER_ELEMENT);
    arrays[name] = new Kind(part);
  }
  return withLists({ ...header, ...arrays });
}

function withLists(graph) {
  const nodes = graph.node_kind.length;
  graph.count = nodes;
  graph.edges = graph.edge_source.length;
  graph.number = new Map(graph.names.map((name, node) => [name, node]));
  graph.into = lists(graph.edge_target, nodes);
  graph.outOf = lists(graph.edge_source, nodes);
  graph.account = new Map(Array.from(graph.target_node, (node, place) => [node, place]));
  graph.isTarget = new Uint8Array(nodes);
  for (const { node } of graph.targets) graph.isTarget[node] = 1;
  graph.guided = graph.node_branch !== undefined; // a page holds it where there is a negative branch alone
  return graph;
}

/** Returns start and order of the edges of every node, as in a sparse matrix. */
function lists(ends, nodes) {
  const start = new Int32Array(nodes + 1);
  for (const end of ends) start[end + 1]++;
  for (let node = 0; node < nodes; node++) start[node + 1] += start[node];
  const next = start.slice(0, nodes);
  const edges = new Int32Array(ends.length);
  for (let edge = 0; edge < ends.length; edge++) edges[next[ends[edge]]++] = edge;
  return { start, edges };
}

/** Returns the edges of one node, in the order of the file. */
export function edgesOf(list, node) {
  return list.edges.subarray(list.start[node], list.start[node + 1]);
}

/** Returns the branch of guidance that a node is of; "" for what is of both, and where a step is one evaluation. */
export function branchOf(graph, node) {
  const shared = graph.node_kind[node] === OUTPUT || graph.streams[graph.node_stream[node]] === "latent";
  return graph.guided && !shared ? BRANCHES[graph.node_branch[node]] : "";
}

/** Returns where a node is active: [positions, values]. */
export function mapOf(graph, node) {
  const from = graph.map_indptr[node];
  const to = graph.map_indptr[node + 1];
  return [graph.map_position.subarray(from, to), graph.map_value.subarray(from, to)];
}
