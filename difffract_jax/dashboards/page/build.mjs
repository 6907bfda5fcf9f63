// Builds the viewer: one script, one style sheet, the licences of what is in the script, and a hash of the sources, by
// which a test without Node can tell a bundle that was not built again.
// Usage: node build.mjs [OUTPUT_DIRECTORY]; the default is ../bundle, which is in git.
import { build } from "esbuild";
import { createHash } from "node:crypto";
import { mkdir, readFile, writeFile, readdir } from "node:fs/promises";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";

const here = dirname(fileURLToPath(import.meta.url));
const out = process.argv[2] ?? join(here, "..", "bundle");
await mkdir(out, { recursive: true });

const made = await build({
  absWorkingDir: here,
  entryPoints: { viewer: "src/main.js" },
  outdir: out,
  bundle: true,
  minify: true,
  format: "iife",
  target: ["es2020"],
  charset: "utf8",
  legalComments: "none",
  metafile: true,
});

const packages = new Set();
for (const input of Object.keys(made.metafile.inputs)) {
  const match = input.match(/node_modules\/((?:@[^/]+\/)?[^/]+)\//);
  if (match) packages.add(match[1]);
}
const parts = [];
for (const name of [...packages].sort()) {
  const folder = join(here, "node_modules", name);
  const about = JSON.parse(await readFile(join(folder, "package.json"), "utf8"));
  const file = (await readdir(folder)).find((entry) => /^licen[cs]e(\.\w+)?$/i.test(entry));
  if (!file) throw new Error(`${name} has no licence file`);
  const text = (await readFile(join(folder, file), "utf8")).replaceAll("\r\n", "\n").trim();
  parts.push(`${name} ${about.version} (${about.license})\n\n${text}\n`);
}
const rule = `\n${"-".repeat(72)}\n\n`;
await writeFile(join(out, "LICENSES.txt"), `The viewer's script contains these packages.\n${rule}${parts.join(rule)}`);

const sources = ["build.mjs", "package-lock.json", "package.json", ...(await readdir(join(here, "src"))).map((name) => `src/${name}`)];
const hash = createHash("sha256");
for (const name of sources.sort()) hash.update(`${name}\n`).update(await readFile(join(here, name)));
await writeFile(join(out, "SOURCES.sha256"), `${hash.digest("hex")}\n`);
