// What adds up to the target. Of the frozen model, target = sum of all edges into it + bias. Every part is shown with
// its sign; the parts add up to the target's value, whatever the sliders hide.
import { ERROR, FEATURE, INPUT, MODULATION, REST, SCORE, WORD, edgesOf } from "./data.js";
import { fill, h, number, percent } from "./dom.js";

/** Returns the parts of the targets' weighted value, and their sum; `value` is null where the file does not tell it. */
export function accountOf(graph, nodeShown, edgeShown) {
  const parts = { features: 0, inputs: 0, errors: 0, rest: 0, attention: 0, modulation: 0, hidden: 0, absent: 0, bias: 0 };
  const kinds = {
    [FEATURE]: "features", [INPUT]: "inputs", [ERROR]: "errors", [REST]: "rest", [SCORE]: "attention",
    [MODULATION]: "modulation", [WORD]: "inputs",
  };
  let value = 0;
  let absolute = 0;
  let shown = 0;
  for (const { node, weight } of graph.targets) {
    const place = graph.account.get(node);
    const edges = edgesOf(graph.into, node);
    let listed = 0;
    for (const e of edges) {
      const part = weight * graph.edge_attribution[e];
      listed += graph.edge_attribution[e];
      if (edgeShown[e] && nodeShown[graph.edge_source[e]]) {
        parts[kinds[graph.node_kind[graph.edge_source[e]]]] += part;
        shown += Math.abs(part);
      } else parts.hidden += part;
    }
    parts.absent += weight * (graph.target_sum[place] - listed);
    parts.bias += weight * graph.target_bias[place];
    value += weight * graph.target_preactivation[place];
    absolute += weight * graph.target_abs_sum[place];
  }
  const known = Number.isFinite(parts.bias) && Number.isFinite(value);
  if (!known) parts.bias = 0;
  const sum = Object.values(parts).reduce((a, b) => a + b, 0);
  const missed = known ? value - sum : 0;
  return { parts, sum, value: known ? value : null, missed, absolute, shown: absolute > 0 ? shown / absolute : null };
}

const WORDS = [
  ["features", "features you see", "What the features in this view add to the target."],
  ["inputs", "inputs", "What comes straight from the prompt's embedding and the noisy image, past all features."],
  ["errors", "errors", "What the transcoders fail to reconstruct: real, but without an explanation."],
  ["rest", "rest", "Features that are active but were not followed when the graph was traced, site by site."],
  ["attention", "attention", "Where heads attend, to first order. The bias holds as much with the opposite sign."],
  ["modulation", "pooled prompt", "What shifts, scales and gates bring, whatever answers them. The bias holds as much with the opposite sign."],
  ["hidden", "hidden by the sliders", "What the pruning below leaves out of this view."],
  ["absent", "not in the file", "Edges too weak to be kept when the graph was traced, or that an earlier pruning cut."],
  ["bias", "bias", "What remains with all sources at zero: biases, and all that is held at this run, such as the pooled prompt."],
];

/** Fills an element with the account: a waterfall of parts, and a sentence. */
export function showAccount(element, graph, account) {
  const { parts, sum, value } = account;
  const total = value ?? sum;
  const rows = WORDS.filter(([key]) => parts[key] !== 0 || key === "features");
  let at = 0;
  const spans = rows.map(([key]) => {
    const from = at;
    at += parts[key];
    return [Math.min(from, at), Math.max(from, at)];
  });
  const low = Math.min(0, total, ...spans.map((span) => span[0]));
  const high = Math.max(0, total, ...spans.map((span) => span[1]));
  const wide = high - low || 1;
  const place = (v) => `${(100 * (v - low)) / wide}%`;
  const line = (key, name, why, from, to, amount) =>
    h("tr", { class: `part ${key}`, title: why },
      h("th", { scope: "row" }, name),
      h("td", { class: "bar" },
        h("span", { class: "zero", style: { left: place(0) } }),
        h("span", { class: `block ${amount < 0 ? "minus" : "plus"}`, style: { left: place(from), width: `${(100 * (to - from)) / wide}%` } })),
      h("td", { class: "figure", "data-value": amount }, number(amount)));
  const body = rows.map(([key, name, why], i) => line(key, name, why, ...spans[i], parts[key]));
  const name = value === null ? "sum of edges" : "target";
  body.push(line("total", name, "What all parts add up to.", Math.min(0, total), Math.max(0, total), total));
  fill(element, h("table", { class: "account" }, h("tbody", {}, body)), sentences(graph, account));
}

function sentences(graph, account) {
  const paragraphs = [];
  if (account.shown !== null) {
    paragraphs.push(h("p", {},
      `Of all that pushes the target up or down, ${percent(account.shown)} is in this view, by size.`,
      account.value === null ? " The file does not tell the target's bias, so the bars add up to the sum of its edges." : ""));
  }
  const pooled = graph.targets.filter((target) => target.pooled);
  for (const { name, pooled: path } of pooled) {
    const whose = pooled.length > 1 ? ` (${name})` : "";
    paragraphs.push(h("p", { class: "pooled" },
      `The prompt also acts through one pooled vector, which this circuit holds fixed${whose}: with the empty prompt's vector `,
      `the target would be ${number(path.without)} instead of ${number(path.value)}, a difference of ${percent(path.share)}. `,
      graph.node_kind.includes(MODULATION) ? "Edges from shifts, scales and gates show that path." : "No edge shows that path."));
  }
  if (account.value !== null && Math.abs(account.missed) > 1e-3 * Math.max(account.absolute, Math.abs(account.value))) {
    paragraphs.push(h("p", {}, `The parts miss the target by ${number(account.missed)}.`));
  }
  return paragraphs;
}
