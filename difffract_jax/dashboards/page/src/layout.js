// Where nodes stand. Nothing is searched for: rows are blocks, from the inputs below to the target above; columns are
// the prompt's words on the left and the image's columns on the right. A node that is summed over positions stands at
// the centre of mass of its activation map. Nodes that would cover each other move apart, as little as can be.
import { IMG, INPUT, OUTPUT, TXT, mapOf } from "./data.js";

const WIDTH = 1000;
const MOST_WIDE = 20_000;
const SLOT = 19;
const LINE = 19;
const GAP = 46;
const BETWEEN = 46;
const ROOMY = 92;
const MOST = 220;
const PADDING = new Set(["<pad>", "[PAD]", "<|endoftext|>"]);

/** Returns the prompt's words up to the last one that says something; padding behind it is one column. */
export function wordsOf(graph) {
  let last = -1;
  graph.tokens.forEach((token, i) => {
    if (!PADDING.has(token) && token !== "</s>") last = i;
  });
  const words = graph.tokens.slice(0, last + 1).map((token) => token.replaceAll("▁", " ").replace("</w>", "").trim() || "·");
  if (graph.tokens.length > last + 1 && graph.tokens.length) words.push("padding");
  if (words.length) return words;
  let most = -1;
  for (let n = 0; n < graph.count; n++) {
    if (graph.node_stream[n] === TXT) most = Math.max(most, graph.node_position[n], ...mapOf(graph, n)[0]);
  }
  return Array.from({ length: Math.min(most + 1, 512) }, (_, i) => String(i));
}

/** Returns where along its zone a node belongs, in [0, 1]; the middle if that is not known. */
function placeOf(graph, node, words) {
  const text = graph.node_stream[node] === TXT;
  const columns = text ? words.length : graph.grid ? graph.grid[1] : 0;
  if (!columns) return 0.5;
  const column = (position) => (text ? Math.min(position, columns - 1) : position % columns);
  if (graph.node_position[node] >= 0) return (column(graph.node_position[node]) + 0.5) / columns;
  const [positions, values] = mapOf(graph, node);
  let mass = 0;
  let moment = 0;
  for (let i = 0; i < positions.length; i++) {
    const weight = Math.abs(values[i]);
    mass += weight;
    moment += weight * (column(positions[i]) + 0.5);
  }
  return mass > 0 ? moment / mass / columns : 0.5;
}

/** Returns the zones of a graph: where words and image columns lie, in world units. */
function zonesOf(graph, words, width) {
  let text = 0;
  let image = 0;
  for (let n = 0; n < graph.count; n++) {
    if (graph.node_kind[n] === OUTPUT) continue;
    if (graph.node_stream[n] === TXT) text++;
    else image++;
  }
  if (!text) return { text: null, image: [0, width] };
  if (!image) return { text: [0, width], image: null };
  const share = Math.min(0.45, Math.max(0.25, (43 * words.length) / WIDTH));
  const middle = share * width;
  return { text: [0, middle - BETWEEN / 2], image: [middle + BETWEEN / 2, width] };
}

/** Lays out the nodes that are shown; returns coordinates of nodes, rows with their names and heights, zones,
 * words. `aspect` is the height of the room there is over its width. */
export function layOut(graph, shown, unfolded, aspect = 0.6) {
  const words = wordsOf(graph);
  const rows = rowsOf(graph, shown, unfolded);
  // A drawing that is too tall for its room is made wider, and so shorter, until it fits.
  for (let width = WIDTH; ; width *= 1.25) {
    const made = withWidth(graph, rows, words, aspect, width);
    if (made.height <= 1.1 * aspect * width || width > MOST_WIDE) return made;
  }
}

function withWidth(graph, rows, words, aspect, width) {
  const zones = zonesOf(graph, words, width);
  const x = new Float32Array(graph.count);
  const y = new Float32Array(graph.count);
  const tall = Math.max(GAP, Math.min(MOST, (WIDTH * aspect) / Math.max(1, rows.length - 1)));
  let bottom = 0;
  let before = rows[0]?.step;
  let apart = ROOMY;
  for (const row of rows) {
    if (row.step !== before) bottom += 0.7 * tall;
    before = row.step;
    const { lines, least } = placeRow(graph, row.nodes, words, zones, x, y);
    apart = Math.min(apart, least);
    row.bottom = -bottom;
    row.top = -(bottom + (lines - 1) * LINE);
    for (const node of row.nodes) y[node] = -bottom - y[node] * LINE;
    bottom += (lines - 1) * LINE + tall;
  }
  const height = Math.max(0, bottom - tall);
  return { x, y, rows, zones, words, width, height, apart, tall };
}

function rowsOf(graph, shown, unfolded) {
  const several = unfolded && graph.steps.length > 1;
  const keyed = new Map();
  for (let n = 0; n < graph.count; n++) {
    const block = graph.node_block[n];
    const input = graph.node_kind[n] === INPUT;
    const step = several ? graph.node_step[n] : 0;
    const key = input ? `${step}/-1` : `${step}/${block}`;
    if (!keyed.has(key)) {
      const name = graph.blocks[String(input ? -1 : block)] ?? (input ? "inputs" : `block ${block}`);
      keyed.set(key, { step, block: input ? -1 : block, name, nodes: [], several });
    }
    if (shown[n]) keyed.get(key).nodes.push(n);
  }
  return [...keyed.values()].sort((a, b) => a.step - b.step || a.block - b.block);
}

/** Places the nodes of a row in the order of where they belong: writes x and line; returns lines and least distance. */
function placeRow(graph, nodes, words, zones, x, y) {
  const sides = [[], []];
  for (const node of nodes) {
    const text = graph.node_stream[node] === TXT;
    sides[(text && zones.text) || !zones.image ? 0 : 1].push(node);
  }
  let most = 1;
  let least = ROOMY;
  sides.forEach((mine, side) => {
    if (!mine.length) return;
    const [from, to] = side === 0 ? zones.text : zones.image;
    const wide = to - from;
    const exact = (node) => (graph.node_kind[node] === OUTPUT ? 0.5 : placeOf(graph, node, words));
    const placed = mine.map((node) => [node, from + exact(node) * wide]).sort((a, b) => a[1] - b[1] || a[0] - b[0]);
    const lines = Math.max(1, Math.ceil((mine.length * SLOT) / (wide * 0.92)));
    for (let line = 0; line < lines; line++) {
      const inLine = placed.filter((_, i) => i % lines === line);
      const apart = Math.min(ROOMY, (0.92 * wide) / inLine.length);
      least = Math.min(least, apart);
      spread(inLine.map(([, wanted]) => wanted), apart, from, to).forEach((at, i) => {
        x[inLine[i][0]] = at;
        y[inLine[i][0]] = line;
      });
    }
    most = Math.max(most, lines);
  });
  return { lines: most, least };
}

/** Moves ascending places apart, in all as little as can be: the means of runs that would overlap (isotonic regression). */
function spread(wanted, apart, from, to) {
  const runs = [];
  wanted.forEach((value, i) => {
    runs.push({ sum: value - i * apart, count: 1 });
    while (runs.length > 1) {
      const [a, b] = runs.slice(-2);
      if (a.sum / a.count <= b.sum / b.count) break;
      runs.splice(-2, 2, { sum: a.sum + b.sum, count: a.count + b.count });
    }
  });
  const flat = runs.flatMap(({ sum, count }) => Array(count).fill(sum / count));
  const lowest = from + apart / 2;
  const highest = to - apart / 2 - (wanted.length - 1) * apart;
  return flat.map((value, i) => Math.max(lowest, Math.min(highest, value)) + i * apart);
}

/** Returns x of a column of words or of the image, in world units; null where the graph has no such zone. */
export function columnCentre(layout, stream, column, columns) {
  const zone = stream === IMG ? layout.zones.image : layout.zones.text;
  return zone && columns ? zone[0] + ((column + 0.5) / columns) * (zone[1] - zone[0]) : null;
}
