// The pages of a scan. Data come as script files that call the functions of `difffract`; every text is shown as text.
"use strict";
const difffract = (() => {
  const $ = (id) => document.getElementById(id);
  const ROW = 46, SORTS = {
    active: "how often it is active", prompts: "prompts in which it is active", peak: "largest value",
    usual: "mean value where active", effect: "direct effect on pixels", feature: "number", label: "label",
  };
  let scan = null, open = null, rows = [], alone = ""; // alone: the one feature that a page of its own is about
  const lists = new Map(), chunks = new Map(), prompts = new Map(), waiting = new Map(), pictures = new Map();

  // 1. Elements and numbers.
  function make(tag, attributes = {}, ...children) {
    const node = document.createElement(tag);
    for (const [key, value] of Object.entries(attributes)) {
      if (key === "text") node.textContent = value;
      else if (key === "style") Object.assign(node.style, value);
      else if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
      else node.setAttribute(key, value);
    }
    node.append(...children);
    return node;
  }
  function draw(tag, attributes = {}, text = "") {
    const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    if (text) node.textContent = text;
    return node;
  }
  function number(value) {
    if (value === 0) return "0";
    const size = Math.abs(value);
    if (size >= 1e5 || size < 1e-3) return value.toExponential(1);
    return String(Number(value.toPrecision(3)));
  }
  function percent(share) {
    if (share === 0) return "0 %";
    if (share < 1e-5) return (100 * share).toExponential(0) + " %";
    return Number((100 * share).toPrecision(share > 0.995 ? 3 : 2)) + " %";
  }
  const siteOf = (name) => scan.sites.find((one) => one.name === name);
  const folder = (site) => site.replace("/", "-");
  const padded = (count) => String(count).padStart(4, "0");
  const rowsOf = (site) => Math.max(1, site.tokens.reduce((sum, one) => sum + one, 0));
  // With guidance by two branches a step has two evaluations, and what is counted by step elsewhere is by evaluation.
  const branches = () => scan.run.branches || 1;
  const evaluation = (i) => branches() === 1 ? `step ${i}` : `step ${Math.floor(i / 2)}, ${["prompt", "negative"][i % 2]}`;

  // 2. Script files, each asked for once.
  function load(path) {
    if (!waiting.has(path)) {
      waiting.set(path, new Promise((done, failed) => {
        const script = make("script", { src: path });
        script.onload = () => done();
        script.onerror = () => { waiting.delete(path); failed(new Error(`${path} is missing; copy the whole folder.`)); };
        document.head.append(script);
      }));
    }
    return waiting.get(path);
  }
  async function listOf(site) {
    if (!lists.has(site)) await load(`data/${folder(site)}/list.js`);
    return lists.get(site);
  }
  async function featureOf(site, feature) {
    const chunk = Math.floor(feature / scan.chunk), key = `${site} ${chunk}`;
    if (!chunks.has(key)) await load(`data/${folder(site)}/${padded(chunk)}.js`);
    return (chunks.get(key) || {})[feature];
  }
  async function promptsOf(numbers) {
    const wanted = new Set(numbers.map((one) => Math.floor(one / scan.chunk)));
    await Promise.all([...wanted].filter((one) => !prompts.has(one)).map((one) => load(`data/prompts/${padded(one)}.js`)));
    return (one) => (prompts.get(Math.floor(one / scan.chunk)) || {})[one];
  }

  // 3. Labels of the reader's own, kept by the browser.
  const drawer = () => `difffract labels ${scan.transcoders}`;
  function notes() {
    try { return JSON.parse(localStorage.getItem(drawer()) || "{}"); } catch { return {}; }
  }
  function note(name, text) {
    const all = notes();
    if (text) all[name] = text; else delete all[name];
    try { localStorage.setItem(drawer(), JSON.stringify(all)); } catch { /* a browser may keep nothing */ }
  }
  function saveNotes() {
    const link = make("a", { download: "labels.json" });
    link.href = URL.createObjectURL(new Blob([JSON.stringify(notes(), null, 1)], { type: "application/json" }));
    link.click();
    URL.revokeObjectURL(link.href);
  }

  // 4. The list: the features of a site, or of all sites where they are few; a row is a site and a place in its list.
  const SMALL = 100000;
  const nameOf = ([site, i]) => `${site}/f${lists.get(site).feature[i]}`;
  const labelOf = (row, own) => own[nameOf(row)] || lists.get(row[0]).label[row[1]];
  async function arrange() {
    const sites = $("all").checked ? scan.sites.map((one) => one.name) : [$("site").value];
    await Promise.all(sites.map(listOf));
    const words = $("search").value.trim().toLowerCase(), by = $("sort").value, own = notes();
    const value = ([site, i]) => (lists.get(site)[by] || lists.get(site).active)[i] / (by === "active" ? rowsOf(siteOf(site)) : 1);
    rows = sites.flatMap((site) => [...lists.get(site).feature.keys()].map((i) => [site, i])).filter((row) => {
      const list = lists.get(row[0]), number_ = String(list.feature[row[1]]);
      return ($("dead").checked || list.active[row[1]] > 0)
        && (!words || `f${number_}` === words || number_ === words || labelOf(row, own).toLowerCase().includes(words));
    });
    if (by === "label") rows.sort((a, b) => (labelOf(a, own) === "") - (labelOf(b, own) === "") || labelOf(a, own).localeCompare(labelOf(b, own)));
    else if (by !== "feature") rows.sort((a, b) => value(b) - value(a));
    const sum = (key) => sites.reduce((total, site) => total + siteOf(site)[key], 0).toLocaleString("en");
    $("count").textContent = `${rows.length.toLocaleString("en")} of ${sum("pages")} features; ${sum("dead")} never active, ${sum("rare")} rare`;
    $("room").style.height = `${rows.length * ROW}px`;
    $("list").scrollTop = 0;
    showRows();
    if (open) steps(open);
  }
  function showRows() {
    const box = $("list"), by = $("sort").value, own = notes();
    const first = Math.max(0, Math.floor(box.scrollTop / ROW) - 4);
    const shown = rows.slice(first, first + Math.ceil((box.clientHeight || 600) / ROW) + 8);
    $("room").replaceChildren(...shown.map((row, place) => {
      const [site, i] = row, list = lists.get(site), name = nameOf(row);
      const figure = by === "peak" || by === "usual" ? number(list[by][i])
        : by === "effect" ? (list.effect ? percent(list.effect[i]) : "")
          : by === "prompts" ? percent(list.prompts[i] / scan.prompts) : percent(list.active[i] / rowsOf(siteOf(site)));
      return make("a", { class: $("all").checked ? "row far" : "row", role: "option", href: `#${name}`,
        style: { top: `${(first + place) * ROW}px` }, "aria-selected": String(open === name), title: name },
      make("span", { class: "name", text: $("all").checked ? name : `f${list.feature[i]}` }),
      make("span", { class: "what", text: labelOf(row, own) || (list.active[i] ? "" : "never active") }),
      make("span", { class: "figure", text: figure }));
    }));
  }
  async function showSite(site) {
    if ($("site").value !== site || !rows.length) {
      $("site").value = site;
      await listOf(site);
      const effect = $("sort").querySelector("option[value=effect]");
      effect.disabled = !lists.get(site).effect;
      if (effect.disabled && $("sort").value === "effect") $("sort").value = "active";
      if (!$("all").checked || !rows.length) await arrange();
    }
    showRows();
  }

  // 5. Examples: the image, where the feature is active in it, and the prompt.
  function cellsOf(text) {
    const bytes = Uint8Array.from(atob(text.slice(1)), (one) => one.charCodeAt(0));
    if (text[0] === "d") return (place) => bytes[place] || 0;
    const valueAt = new Map();
    for (let i = 0; i < bytes.length; i += 3) valueAt.set(256 * bytes[i] + bytes[i + 1], bytes[i + 2]);
    return (place) => valueAt.get(place) || 0;
  }
  function sprite(path, place, columns) {
    const at = (i) => `${columns > 1 ? (100 * i) / (columns - 1) : 0}%`;
    return { backgroundImage: `url("${pictures.get(path) || path}")`, backgroundSize: `${100 * columns}% ${100 * columns}%`,
      backgroundPosition: `${at(place % columns)} ${at(Math.floor(place / columns))}` };
  }
  function picture(prompt, grey) {
    const sheet = Math.floor(prompt.thumb / scan.sheet), side = Math.sqrt(scan.sheet);
    const path = `data/thumbs/${padded(sheet)}.${scan.kind}`;
    return make("span", { class: grey ? "pic grey" : "pic", style: sprite(path, prompt.thumb % scan.sheet, side) });
  }
  function heatOver(cell, first) {
    const [high, wide] = scan.cells, canvas = make("canvas", { width: wide, height: high });
    const pen = canvas.getContext("2d");
    for (let i = 0; i < high * wide; i++) {
      const share = cell(first + i) / 255;
      pen.fillStyle = `rgb(230 85 13 / ${share ? 0.1 + 0.8 * share : 0})`;
      pen.fillRect(i % wide, Math.floor(i / wide), 1, 1);
    }
    return canvas;
  }
  function words(prompt, cell, first, peak) {
    const tokens = prompt.tokens.flatMap((token, i) => {
      const share = cell ? cell(first + i) / 255 : 0, spaced = token.replace(/\u2581/g, " ");
      const text = token === "</s>" ? (share ? "\u23ce" : "") : spaced.trimStart(); // the closing token, where it counts
      if (!text) return [token === "</s>" ? "" : spaced];
      const span = make("span", { text });
      if (token === "</s>") span.title = "closing token";
      if (share) span.style.background = `rgb(var(--heat) / ${0.12 + 0.6 * share})`;
      if (i === peak) span.className = "peak";
      return [token === "</s>" || spaced !== text ? " " : "", span];
    });
    return make("span", { class: "words" }, ...tokens);
  }
  function example(site, one, prompt) {
    const [, step, side, position, value, , map, branch] = one, cell = cellsOf(map), streams = site.streams;
    const text = streams.includes("txt") ? 0 : -1;
    const image = streams.includes("img") ? (text === 0 ? scan.run.text_tokens : 0) : -1;
    const pair = make("span", { class: Math.max(...scan.thumb) <= 64 ? "pair small" : "pair" });
    const ratio = { aspectRatio: `${scan.thumb[1]} / ${scan.thumb[0]}` };
    pair.append(make("span", { style: ratio }, picture(prompt, false)));
    if (image >= 0) pair.append(make("span", { style: ratio }, picture(prompt, true), heatOver(cell, image)));
    if (image < 0) pair.classList.add("alone");
    // In the negative branch words are the negative prompt's; the image is the run's, whichever branch it is.
    const read = branch === "negative" ? { tokens: scan.run.negative_words } : prompt;
    return [pair, words(read, text >= 0 ? cell : null, 0, side === "txt" ? position : -1),
      make("span", { class: "meta", text: `${number(value)} at ${side === "txt" ? "word" : "patch"} ${position}, step ${step}${branch ? `, ${branch}` : ""}` })];
  }
  function examples(site, name, feature, find) {
    const part = make("section"), commands = make("section");
    const cards = feature.examples.map((one) => {
      const prompt = find(one[0]);
      const card = make("button", { type: "button", class: "example", "aria-pressed": "false",
        title: "Show the commands that make this example again", onclick: () => choose(one, card) },
      ...example(site, one, prompt));
      return card;
    });
    function choose(one, card) {
      for (const other of cards) other.setAttribute("aria-pressed", String(other === card));
      commands.replaceChildren(...again(site, name, one, find(one[0])));
    }
    const tier = (code) => cards.filter((_, i) => feature.examples[i][5] === code);
    part.append(make("h2", { text: "Strongest examples" }), make("div", { class: "grid" }, ...tier(0)));
    const others = [1, 2, 3].filter((code) => tier(code).length);
    if (others.length) {
      part.append(make("h2", { text: "Weaker examples" }),
        make("p", { class: "soft", text: "Of a random sample of the other prompts in which it is active, by the largest value in each." }),
        make("div", { class: "thirds" }, ...others.map((code) => make("div", {},
          make("h3", { text: scan.tiers[code] }), make("div", { class: "grid" }, ...tier(code))))));
    }
    if (cards.length) choose(feature.examples[0], cards[0]);
    return [part, commands];
  }
  function quoted(text) {
    return /^[\w@%+=:,./-]+$/.test(text) ? text : `'${text.replace(/'/g, "'\\''")}'`;
  }
  function again(site, name, one, prompt) {
    const [model, transcoders] = scan.names.map(quoted), [, step, side, position, , , , branch] = one;
    const run = scan.run, of = branch ? `~${branch}` : "", at = `${name}@${site.streams.length > 1 ? side : ""}${position}${of}`;
    const away = run.negative_prompt ? ` --negative-prompt ${quoted(run.negative_prompt)}` : "";
    const sizes = `--seed ${prompt.seed} --steps ${run.steps} --height ${run.height} --width ${run.width} --text-tokens ${run.text_tokens}${run.guidance === null ? "" : ` --guidance ${run.guidance}`}${away}${(scan.lora || []).map((one) => ` --lora ${quoted(one)}`).join("")}`;
    const lines = [];
    if (scan.role === "transcoder") lines.push(`difffract trace ${model} ${transcoders} ${quoted(prompt.text)} --target ${at} --step ${step} ${sizes}`);
    lines.push(`difffract steer ${model} ${transcoders} ${quoted(prompt.text)} --edit ${name}=zero ${sizes.replace("--seed", "--seeds")}`);
    return [make("h2", { text: "Go on from the marked example" }),
      make("p", { class: "soft", text: `\u201c${prompt.text}\u201d, seed ${prompt.seed}: trace what makes the feature fire there, or draw the image without it.` }),
      ...lines.map((line) => make("pre", { text: line }))];
  }

  // 6. Charts.
  function chart(bars, labels, words, describe, groups = 1) {
    const wide = 320, high = 120, bottom = 18, top = 14, step = wide / bars.length, most = Math.max(...bars) || 1;
    const svg = draw("svg", { viewBox: `0 0 ${wide} ${high}`, role: "img", "aria-label": words });
    bars.forEach((value, i) => {
      const size = (value / most) * (high - bottom - top);
      const bar = draw("rect", { class: i % groups ? "bar second" : "bar", x: i * step + step * 0.1, width: step * 0.8, y: high - bottom - size, height: Math.max(size, value ? 0.8 : 0) });
      bar.append(draw("title", {}, describe(i)));
      svg.append(bar);
    });
    svg.append(draw("line", { class: "axis", x1: 0, x2: wide, y1: high - bottom, y2: high - bottom }));
    for (const [place, text] of labels) {
      const edge = place < 0.06 ? "start" : place > 0.94 ? "end" : "middle";
      svg.append(draw("text", { x: place * wide, y: high - 5, "text-anchor": edge }, text));
    }
    return svg;
  }
  function values(bars) {
    return (svg) => {
      const most = Math.max(...bars) || 1, step = 320 / bars.length;
      bars.forEach((value, i) => svg.append(draw("text", { x: (i + 0.5) * step, y: 98 - (value / most) * 88, "text-anchor": "middle" },
        value >= 1 || value === 0 ? number(value) : percent(value))));
      return svg;
    };
  }
  function histogram(site, feature) {
    const counts = feature.histogram, used = [...counts.keys()].filter((i) => counts[i]);
    const first = Math.max(0, used[0] - 1), last = Math.min(counts.length - 1, used[used.length - 1] + 1);
    const bars = counts.slice(first, last + 1), total = counts.reduce((a, b) => a + b, 0), labels = [];
    const every = Math.max(1, Math.ceil(bars.length / 7));
    for (let i = first; i < last; i += every) labels.push([(i - first + 1) / bars.length, number(site.edges[i])]);
    const span = (i) => i === 0 ? `up to ${number(site.edges[0])}` : i === site.edges.length ? `over ${number(site.edges[i - 1])}`
      : `${number(site.edges[i - 1])} to ${number(site.edges[i])}`;
    return make("figure", {}, chart(bars, labels, "Histogram of the feature's values where it is active",
      (i) => `${span(i + first)}: ${bars[i].toLocaleString("en")} tokens, ${percent(bars[i] / total)}`),
    make("figcaption", { text: `Values of the ${total.toLocaleString("en")} tokens at which it is active; bins are half octaves.` }));
  }
  function profile(site, feature) {
    const often = feature.active.map((count, i) => count / Math.max(1, site.tokens[i])), many = branches();
    const steps = feature.active.length / many, labels = [...Array(steps).keys()].map((i) => [(i + 0.5) / steps, `step ${i}`]);
    const few = feature.active.length <= 8;
    const short = labels.filter((_, i) => steps <= 8 || i % Math.ceil(steps / 6) === 0);
    const pairs = many > 1 ? " The first bar of each pair is of the prompt, the paler one of the negative prompt." : "";
    const shares = few ? values(often) : (svg) => svg, means = few ? values(feature.mean) : (svg) => svg;
    return [
      make("figure", {}, shares(chart(often, short, "Share of tokens at which the feature is active, by denoising step", (i) => `${evaluation(i)}: ${percent(often[i])}`, many)),
        make("figcaption", { text: `How often it is active, by denoising step; step 0 has most noise.${pairs}` })),
      make("figure", {}, means(chart(feature.mean, short, "Mean value where the feature is active, by denoising step", (i) => `${evaluation(i)}: ${number(feature.mean[i])}`, many)),
        make("figcaption", { text: "Mean value where it is active, by denoising step." })),
    ];
  }

  // 7. Links, effect, labels.
  function linkList(title, about, ends, digits) {
    const most = Math.max(...ends.map((one) => Math.abs(one.value))) || 1;
    return make("div", {}, make("h3", { text: title }), make("p", { class: "soft", text: about }),
      make("ol", {}, ...ends.map(({ name, label, value, link }) => {
        const end = link ? make("a", { class: "name", href: `#${name}`, text: name }) : make("span", { class: "name", text: name });
        const bar = make("i", { class: value < 0 ? "against" : "", style: { width: `${(100 * Math.abs(value)) / most}%` } });
        return make("li", {}, end, make("span", { class: "what", text: notes()[name] || label, title: notes()[name] || label }),
          make("span", { class: "weight", text: digits(value) }), make("span", { class: "track" }, bar));
      })));
  }
  async function hasPage() {
    const partly = scan.sites.filter((one) => one.pages < scan.features);
    const listed = await Promise.all(partly.map(async (one) => [one.name, new Set((await listOf(one.name)).feature)]));
    const some = new Map(listed);
    return (site, other) => Boolean(siteOf(site)) && (!some.has(site) || some.get(site).has(other));
  }
  function links(feature, known) {
    const named = (ends) => ends.map(([site, other, value, label]) => ({ name: `${scan.sites[site].name}/f${other}`, label: label || "", value,
      link: known(scan.sites[site].name, other) }));
    const linked = (name) => { const parts = /^(\w+\/\d+)\/f(\d+)$/.exec(name); return Boolean(parts) && known(parts[1], Number(parts[2])); };
    const signed = (value) => (value < 0 ? "\u2212" : "+") + percent(Math.abs(value)), columns = [];
    if (feature.up.length) columns.push(linkList("Upstream, by weights", "What earlier features at the same token usually add to this one, as a share of its usual value.", named(feature.up), signed));
    if (feature.down.length) columns.push(linkList("Downstream, by weights", "What this one adds to later features at the same token, as a share of their usual values.", named(feature.down), signed));
    if (feature.near.length) columns.push(linkList("Nearest decoder vectors", "Cosine with other features of the site: what they write is alike.", named(feature.near), (value) => value.toFixed(2)));
    for (const [way, title] of [["up", "Upstream, in the graph"], ["down", "Downstream, in the graph"]]) {
      const ends = ((feature.graph || {})[way] || []).map(([name, value]) => ({ name, label: "", value, link: linked(name) }));
      if (ends.length) columns.push(linkList(title, `Edges of ${scan.graph}, summed over positions, as shares of their targets.`, ends, signed));
    }
    return columns.length ? [make("h2", { text: "Linked features" }), make("div", { class: "links" }, ...columns)] : [];
  }
  function effect(site, name, feature) {
    if (feature.effect === undefined || !feature.active.some(Boolean)) return [];
    const number_ = Number(name.slice(name.lastIndexOf("f") + 1)), place = number_ % scan.chunk;
    const path = `data/${folder(site.name)}/${padded(Math.floor(number_ / scan.chunk))}.png`, side = Math.sqrt(scan.chunk);
    const faint = feature.effect < 1 / 255;
    const words = faint ? "Too faint to see: by itself it changes no pixel by a step of 255."
      : `The largest change is ${percent(feature.effect)} of a colour's range; the picture is scaled up to show it. Grey is no change.`;
    return [make("h2", { text: "Direct effect on pixels" }), make("div", { class: "effect" },
      make("div", { class: "sheet pixels", role: "img", "aria-label": "What the feature adds to the image around one patch",
        style: { ...sprite(path, place, side), aspectRatio: "1" } }),
      make("div", {}, make("p", { text: words }), make("p", { class: "soft", text:
        "What its usual value at one patch adds to the predicted image around it, through the last layer and the autoencoder's decoder alone, at the mean of all images of the scan. Later blocks may do more."
          + (branches() > 1 ? ` In the evaluation with the prompt, whose velocity counts ${number(scan.run.guidance)} times; in that with the negative prompt the sign is the other one, and the factor ${number(scan.run.guidance - 1)}.` : "") })))];
  }
  function detects(feature) {
    if (!(feature.detects || []).length) return [];
    return [make("h2", { text: "What it detects" }), make("div", { class: "scroll" }, make("table", {},
      make("tr", {}, ...["factor", "value", "AUROC", "step", "of"].map((text) => make("th", { scope: "col", text }))),
      ...feature.detects.map((row) => make("tr", {}, ...row.map((cell, i) => make("td", { text: i === 4 ? { img: "patches", txt: "words" }[cell] || cell : i === 2 ? cell.toFixed(2) : String(cell) })))))),
    make("p", { class: "soft", text: "AUROC: how well its value tells tokens with the factor from tokens without, 0.5 being chance." })];
  }
  function ownLabel(name, feature) {
    const field = make("input", { type: "text", "aria-label": "Your own label", placeholder: "Your own label", value: notes()[name] || "", maxlength: "200" });
    field.addEventListener("change", () => { note(name, field.value.trim()); show().catch(failed); });
    return make("div", { class: "note" }, field, make("button", { type: "button", text: "Save labels", title: "All labels of your own as a file that difffract dashboards --labels reads", onclick: saveNotes }));
  }

  // 8. The page.
  function facts(site, feature) {
    const active = feature.active.reduce((a, b) => a + b, 0), all = site.l0.reduce((sum, one, i) => sum + one * site.tokens[i], 0);
    const usual = feature.active.reduce((sum, count, i) => sum + count * feature.mean[i], 0) / Math.max(1, active);
    const rows = [["of the tokens", percent(active / rowsOf(site))], ["of the prompts", percent(feature.prompts / scan.prompts)],
      ["share of the site's L0", percent(all ? active / all : 0)], ["largest value", number(feature.peak)], ["mean where active", number(usual)]];
    if (site.streams.length > 1) rows.splice(1, 0, ["of these, at words", percent(feature.text / Math.max(1, active))]);
    return make("dl", { class: "facts" }, ...rows.map(([name, value]) => make("div", {}, make("dt", { text: name }), make("dd", { text: value }))));
  }
  function title(site, name, feature) {
    const active = feature.active.reduce((a, b) => a + b, 0), own = notes()[name];
    const chips = !active ? ["dead"] : active / rowsOf(site) < 1e-4 ? ["rare"] : [];
    return [make("h1", {}, make("span", { class: "name", text: name }), own || feature.label || "",
      ...chips.map((text) => make("span", { class: "chip", text, title: { dead: "never active in this scan", rare: "active at less than 0.01 % of the tokens" }[text] }))),
    make("p", { class: "soft", text: `Block ${scan.blocks[scan.sites.indexOf(site)]}, ${site.streams.map((one) => ({ img: "image", txt: "text" })[one]).join(" and ")} tokens; `
      + `on average ${number(site.l0.reduce((a, b) => a + b, 0) / site.l0.length)} of the site's ${scan.features.toLocaleString("en")} features are active at a token.` })];
  }
  function missing(words) {
    $("page").replaceChildren(make("h1", { text: words }), make("p", { class: "soft", text: "Choose a feature of the list, or open one by its name." }));
  }
  async function show() {
    const wanted = alone || decodeURIComponent(location.hash.slice(1)), parts = /^(\w+\/\d+)(?:\/f(\d+))?(?:[@#].*)?$/.exec(wanted);
    document.body.classList.toggle("open", Boolean(parts && parts[2]));
    const site = parts && siteOf(parts[1]);
    if (!site) { open = null; await showSite($("site").value); return wanted ? missing(`There is no feature ${wanted} in this scan.`) : overview(); }
    open = parts[2] === undefined ? null : `${site.name}/f${Number(parts[2])}`;
    await showSite(site.name);
    if (open === null) return overview();
    const name = open, listed = (await listOf(site.name)).feature.includes(Number(parts[2]));
    const feature = listed ? await featureOf(site.name, Number(parts[2])) : undefined;
    if (open !== name) return undefined;
    document.title = name;
    $("jump").value = name;
    steps(name);
    if (!feature) return missing(`There is no page of ${name} in this scan.`);
    const [find, known] = await Promise.all([promptsOf(feature.examples.map((one) => one[0])), hasPage()]);
    if (open !== name) return undefined;
    const [shown, commands] = examples(site, name, feature, find), body = [...title(site, name, feature), ...(alone ? [] : [ownLabel(name, feature)]), facts(site, feature)];
    if (feature.examples.length) body.push(shown, make("h2", { text: "Activation" }), make("div", { class: "charts" }, histogram(site, feature), ...profile(site, feature)));
    else body.push(make("p", { text: `It was never active: none of the ${scan.prompts.toLocaleString("en")} prompts of this scan made it fire. It may fire for others.` }));
    body.push(...effect(site, name, feature), ...detects(feature), ...links(feature, known));
    if (feature.examples.length) body.push(commands);
    $("page").replaceChildren(...body);
    $("page").scrollTop = $("panes").scrollTop = 0;
    document.body.dataset.ready = name;
    return undefined;
  }
  function steps(name) {
    const at = rows.findIndex((row) => nameOf(row) === name), box = $("list");
    const top = at * ROW;
    if (at >= 0 && (top < box.scrollTop || top + ROW > box.scrollTop + box.clientHeight)) box.scrollTop = top - box.clientHeight / 2;
    for (const [id, place] of [["before", at - 1], ["after", at + 1]]) {
      if (at >= 0 && place >= 0 && place < rows.length) $(id).href = `#${nameOf(rows[place])}`;
      else $(id).removeAttribute("href");
    }
  }
  function overview() {
    document.title = "Features";
    for (const id of ["before", "after"]) $(id).removeAttribute("href");
    const heads = ["site", "block", "features", "never active", "rare", ...scan.sites[0].l0.map((_, i) => `L0, ${evaluation(i)}`)].slice(0, 13);
    $("page").replaceChildren(make("h1", { text: "What features do" }),
      make("p", { text: `${scan.sites.reduce((sum, one) => sum + one.pages, 0).toLocaleString("en")} features of the ${scan.role}s ${scan.names[1]}, of the model ${scan.names[0]}, over ${scan.prompts.toLocaleString("en")} prompts of ${scan.run.steps} steps each${branches() > 1 ? `, each step evaluated twice, guided by ${number(scan.run.guidance)} away from the negative prompt \u201c${scan.run.negative_prompt}\u201d` : ""}.` }),
      make("p", { class: "soft", text: `L0: features active at a token, on average. Rare: active at less than 0.01 % of the tokens. Content hashes: model ${scan.model.slice(0, 12)}, ${scan.role}s ${scan.transcoders.slice(0, 12)}.` }),
      make("div", { class: "scroll" }, make("table", {}, make("tr", {}, ...heads.map((text) => make("th", { scope: "col", text }))),
        ...scan.sites.map((one, i) => make("tr", {}, make("td", {}, make("a", { class: "name", href: `#${one.name}`, text: one.name })),
          ...[scan.blocks[i], one.pages.toLocaleString("en"), percent(one.dead / Math.max(1, one.pages)), percent(one.rare / Math.max(1, one.pages)), ...one.l0.slice(0, 8).map(number)].map((text) => make("td", { text })))))));
    document.body.dataset.ready = "overview";
  }
  function failed(error) {
    $("page").replaceChildren(make("p", { text: error.message }));
  }
  // In the viewer's panel a page has the viewer's theme, else the system's.
  addEventListener("message", ({ source, data }) => {
    const theme = data?.difffractTheme;
    if (source === parent && ["light", "dark"].includes(theme)) document.documentElement.dataset.theme = theme;
  });
  function start() {
    $("site").replaceChildren(...scan.sites.map((one) => make("option", { value: one.name, text: one.name })));
    $("sort").replaceChildren(...Object.entries(SORTS).map(([value, text]) => make("option", { value, text })));
    $("site").addEventListener("change", () => { location.hash = $("site").value; });
    $("everywhere").hidden = scan.sites.reduce((sum, one) => sum + one.pages, 0) > SMALL;
    for (const id of ["search", "sort", "dead", "all"]) $(id).addEventListener("input", () => arrange().catch(failed));
    $("list").addEventListener("scroll", showRows, { passive: true });
    addEventListener("resize", showRows);
    $("go").addEventListener("submit", (event) => { event.preventDefault(); location.hash = $("jump").value.trim(); });
    addEventListener("keydown", (event) => {
      if (/INPUT|SELECT|TEXTAREA/.test(event.target.tagName) || event.ctrlKey || event.metaKey || event.altKey) return;
      if (event.key === "/") { event.preventDefault(); $("search").focus(); }
      const link = { ArrowLeft: "before", ArrowRight: "after" }[event.key];
      if (link && $(link).hasAttribute("href")) location.hash = new URL($(link).href).hash;
    });
    addEventListener("hashchange", () => show().catch(failed));
    show().catch(failed);
  }

  return {
    index(value) { scan = value; start(); },
    list(site, value) { lists.set(site, value); },
    features(site, chunk, value) { chunks.set(`${site} ${chunk}`, value); },
    prompts(chunk, value) { prompts.set(chunk, value); },
    pictures(value) { for (const [path, address] of Object.entries(value)) pictures.set(path, address); },
    only(name) { alone = name; document.body.classList.add("alone"); },
  };
})();
