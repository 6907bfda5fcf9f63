"""The folder of pages: whole or resumed the same, complete, readable as data, and nothing in it is markup."""

import base64
import errno
import hashlib
import json
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from scans import PROMPTS, SEED, places, small

import difffract_jax as dfx
from difffract_jax.circuits.notation.feature import Feature
from difffract_jax.config import UserError
from difffract_jax.dashboards.features import pages
from difffract_jax.dashboards.features import scan as first_pass
from difffract_jax.dashboards.features.alone import feature_page
from difffract_jax.dashboards.features.build import build_dashboards
from difffract_jax.dashboards.features.corpus import Corpus
from difffract_jax.dashboards.features.record import FOLDER, load_scan
from difffract_jax.dashboards.features.request import DashboardOptions, identity_of, sizes_of
from difffract_jax.dashboards.features.texts import Text
from difffract_jax.estimate.scanning import disk_bytes, state_bytes
from difffract_jax.storage.files import write_tensors
from difffract_jax.storage.locks import sole_writer
from traces import cast

HOSTILE = '</script><script>alert("1")</script>\u202e\u2028' + "x" * 10_000
OPTIONS = DashboardOptions(top=3, per_third=1, sample=5, links=4, seconds=0.0, texts={"img/1/f3": Text(HOSTILE)})


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The pages of the small corpus, with what was told, and how far it was at each time."""
    out, told = tmp_path_factory.mktemp("pages") / "out", []
    done = build_dashboards(small().corpus, small().tcs, out, OPTIONS, progress=lambda *step: told.append(step))
    return out, done, told


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def calls(path):
    """Returns the arguments of the one call that a file of data is."""
    match = re.fullmatch(r"difffract\.(\w+)\((.*)\);\n", path.read_text(encoding="ascii"), re.DOTALL)
    assert match, path
    return json.loads(f"[{match[2]}]")


def test_every_feature_has_a_record_and_every_file_that_it_names_is_there(built):
    out, done, told = built
    (index,) = calls(out / "data" / "index.js")
    assert [site["name"] for site in index["sites"]] == list(places(small())) and done.pages == 8 * 40
    assert done.dead == sum(site["dead"] for site in index["sites"]) >= 8
    prompts = {}
    for path in (out / "data" / "prompts").iterdir():
        prompts |= calls(path)[1]
    for site in index["sites"]:
        folder = out / "data" / site["name"].replace("/", "-")
        name, columns = calls(folder / "list.js")
        _, chunk, features = calls(folder / "0000.js")
        assert (name, chunk) == (site["name"], 0)
        assert columns["feature"] == [int(f) for f in features] == list(range(40))
        assert (folder / "0000.png").exists() == ("img" in site["streams"])
        for number, record in features.items():
            assert sum(record["histogram"]) == sum(record["active"]) == columns["active"][int(number)]
            assert bool(record["examples"]) == (sum(record["active"]) > 0)
            assert {str(one[0]) for one in record["examples"]} <= prompts.keys()
    assert len(prompts) == done.prompts == len(PROMPTS)
    assert {one["text"] for one in prompts.values()} == set(PROMPTS)
    assert [one["seed"] for _, one in sorted(prompts.items())] == [str(SEED + n) for n in range(len(PROMPTS))]
    with Image.open(out / "data" / "thumbs" / "0000.png") as sheet:
        assert sheet.size == (4 * 24, 4 * 16)
    assert {path.name for path in pages.ASSETS.iterdir()} <= {path.name for path in out.iterdir()}
    assert [one for one in dict.fromkeys(stage for stage, *_ in told)] == [
        *("Scanning prompts", "Drawing examples", "Comparing weights", "Writing pages")
    ]


def test_l0_of_a_site_is_what_its_features_add_up_to(built):
    out, _, _ = built
    (index,) = calls(out / "data" / "index.js")
    for site in index["sites"]:
        records = calls(out / "data" / site["name"].replace("/", "-") / "0000.js")[2].values()
        active = np.sum([record["active"] for record in records], axis=0)
        assert np.allclose(active / site["tokens"], site["l0"], rtol=1e-3)


def test_an_interrupted_scan_goes_on_and_makes_the_same(built, tmp_path, monkeypatch):
    scanned = []
    count = first_pass.scan_batch
    monkeypatch.setattr(first_pass, "scan_batch", lambda *a: scanned.append(a[2].done) or count(*a))

    def stop(at):
        def progress(stage, done, total):
            if (stage, done) == at:
                raise KeyboardInterrupt

        return progress

    out = tmp_path / "out"
    for at in (("Scanning prompts", 6), ("Drawing examples", 3), ("Writing pages", 40 * 5)):
        with pytest.raises(KeyboardInterrupt):
            build_dashboards(small().corpus, small().tcs, out, OPTIONS, progress=stop(at))
        assert not out.exists() and len(list(tmp_path.glob(".out.*.partial"))) == 1
    build_dashboards(small().corpus, small().tcs, out, OPTIONS)
    assert scanned == [0, 0, 1, 2], "the first prompt for scales, then each batch once"
    assert contents(out) == contents(built[0])
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_full_disk_is_told_in_one_sentence_and_the_scan_goes_on_later(built, tmp_path, monkeypatch):
    out = tmp_path / "out"
    write = pages.write_script

    def full(path, *call):
        if path.name == "list.js" and "single-0" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write(path, *call)

    monkeypatch.setattr(pages, "write_script", full)
    with pytest.raises(UserError, match="disk of .* is full; make room and run the same again"):
        build_dashboards(small().corpus, small().tcs, out, OPTIONS)
    monkeypatch.setattr(pages, "write_script", write)
    monkeypatch.setattr(first_pass, "scan_batch", None)  # nothing is scanned again
    build_dashboards(small().corpus, small().tcs, out, OPTIONS)
    assert contents(out) == contents(built[0])


def test_what_was_kept_and_then_damaged_is_not_used(built, tmp_path):
    def stop(stage, done, total):
        if stage == "Drawing examples":
            raise KeyboardInterrupt

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        build_dashboards(small().corpus, small().tcs, out, OPTIONS, progress=stop)
    (kept,) = tmp_path.glob(".out.*.partial/files/work/scanned-*.safetensors")
    kept.write_bytes(kept.read_bytes()[:-1] + b"\x7f")
    build_dashboards(small().corpus, small().tcs, out, OPTIONS)
    assert contents(out) == contents(built[0])


def test_texts_are_data_and_never_markup(built):
    out, _, _ = built
    _, _, features = calls(out / "data" / "img-1" / "0000.js")
    assert features["3"]["label"] == HOSTILE
    assert all(byte < 128 for path in (out / "data").rglob("*.js") for byte in path.read_bytes())
    script = (out / "pages.js").read_text(encoding="utf-8")
    for markup in ("innerHTML", "outerHTML", "insertAdjacent", "document.write", "eval(", "fetch(", "XMLHttp"):
        assert markup not in script
    for path in (out / "index.html", out / "pages.css", out / "pages.js"):
        assert not re.findall(r"https?://(?!www\.w3\.org/2000/svg)", path.read_text(encoding="utf-8"))


def test_only_features_that_are_asked_for_get_a_page(tmp_path):
    wanted = tuple(map(Feature.parse, ("img/1/f3", "img/1/f7", "single/0/f39")))
    options = DashboardOptions(top=2, per_third=1, sample=5, links=2, features=wanted)
    done = build_dashboards(small().corpus, small().tcs, tmp_path / "out", options)
    assert (done.pages, done.dead) == (3, 1)
    assert calls(tmp_path / "out/data/img-1/0000.js")[2].keys() == {"3", "7"}
    assert calls(tmp_path / "out/data/img-0/list.js")[1]["feature"] == []
    with pytest.raises(UserError, match="features 0 to 39"):
        bad = DashboardOptions(features=(Feature.parse("img/1/f40"),))
        build_dashboards(small().corpus, small().tcs, tmp_path / "other", bad)
    with pytest.raises(UserError, match="no transcoders of img/9"):
        bad = DashboardOptions(features=(Feature.parse("img/9/f0"),))
        build_dashboards(small().corpus, small().tcs, tmp_path / "other", bad)


def test_pages_of_features_that_never_fire_are_made(tmp_path):
    tcs = small().tcs
    stacks = {name: jax.tree.map(lambda leaf: leaf, stack) for name, stack in tcs.stacks.items()}
    for stack in stacks.values():
        stack.enc.bias[...] = jnp.full_like(stack.enc.bias[...], -1e6)
    done = build_dashboards(small().corpus, tcs._replace(stacks=stacks), tmp_path / "out", OPTIONS)
    assert (done.pages, done.dead, done.prompts) == (320, 320, 0)
    record = calls(tmp_path / "out/data/single-1/0000.js")[2]["0"]
    assert (record["examples"], record["up"], record["effect"]) == ([], [], 0.0)
    assert load_scan(tmp_path / "out").of("img/0/f0").flag == "dead"


def test_another_folder_is_never_replaced(built, tmp_path):
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="not a folder of dashboards"):
            build_dashboards(small().corpus, small().tcs, tmp_path, OPTIONS, overwrite=overwrite)
    with pytest.raises(UserError, match="exists already"):
        build_dashboards(small().corpus, small().tcs, built[0], OPTIONS)
    assert (tmp_path / "file").read_text(encoding="utf-8") == "mine"


def test_a_folder_has_one_writer(tmp_path):
    out = tmp_path / "out"
    with sole_writer(out), pytest.raises(UserError, match="Another process is writing"):
        build_dashboards(small().corpus, small().tcs, out, OPTIONS)


def test_no_prompts_are_refused(tmp_path):
    one = small()
    with pytest.raises(UserError, match="needs prompts"):
        build_dashboards(Corpus(one.corpus.pipe, one.corpus.run, (), 0, 2), one.tcs, tmp_path / "out")
    many = Corpus(one.corpus.pipe, one.corpus.run, ("a fox",) * (2**31 // (2 * 22) + 1), 0, 2)
    with pytest.raises(UserError, match="22 tokens in 2 steps are more than the 2,147,483,648 tokens"):
        build_dashboards(many, one.tcs, tmp_path / "out")


def test_the_record_reads_what_the_pages_show(built):
    out, _, _ = built
    scan = load_scan(out)
    assert scan.sites == tuple(places(small())) and scan.prompts == PROMPTS
    _, _, features = calls(out / "data" / "single-0" / "0000.js")
    number = max(features, key=lambda f: sum(features[f]["active"]))
    found, record = scan.of(f"single/0/f{number}@img1"), features[number]
    assert found.peak == pytest.approx(record["peak"], rel=1e-3)
    assert found.density == pytest.approx(sum(record["active"]) / (2 * scan.config["sites"]["single/0"]["tokens"]))
    assert sum(found.frequency) / 2 == pytest.approx(found.density)
    for example, (prompt, step, side, position, value, tier, _) in zip(found.examples, record["examples"], strict=True):
        assert (example.prompt, example.seed) == (PROMPTS[prompt], SEED + prompt)
        assert (example.feature.steps, example.feature.side, example.feature.positions) == ((step,), side, (position,))
        assert example.value == pytest.approx(value, rel=1e-3) and example.tier == scan.config["tiers"][tier]
    shares = [scan.of(f"single/0/f{f}").l0_share for f in range(40)]
    assert sum(shares) == pytest.approx(1)
    for shown in (scan, found, found.examples[0], scan.site("img/0")):
        assert 1 <= len(repr(shown).splitlines()) <= 15
    assert scan.of("img/0/f7").flag == "dead" and "never active" in repr(scan.of("img/0/f7"))


def test_a_record_that_is_none_is_refused(built, tmp_path):
    with pytest.raises(UserError, match="holds no scan"):
        load_scan(tmp_path)
    folder = tmp_path / FOLDER
    folder.mkdir()
    config = json.loads((built[0] / FOLDER / "config.json").read_text(encoding="utf-8")) | {"format_version": 99}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "prompts.jsonl").write_text("", encoding="utf-8")
    with pytest.raises(UserError, match="version 99"):
        load_scan(tmp_path)
    scan = load_scan(built[0])
    with pytest.raises(UserError, match="no site img/8"):
        scan.of("img/8/f0")
    with pytest.raises(UserError, match="40 features"):
        scan.of("img/0/f40")


def damaged(folder, target, change):
    """Copies what a scan found, and changes its record."""
    shutil.copytree(folder / FOLDER, target / FOLDER)
    path = target / FOLDER / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    change(config)
    path.write_text(json.dumps(config), encoding="utf-8")
    return target


@pytest.mark.parametrize(
    ("change", "place"),
    [
        (lambda config: config.pop("sites"), "sites"),
        (lambda config: config.update(features="40"), "features"),
        (lambda config: config["run"].pop("grid"), "run: grid"),
        (lambda config: config["sites"]["img/1"].pop("tokens"), "sites: img/1: tokens"),
        (lambda config: config["sites"].update({"img/1": None}), "sites: img/1: streams"),
    ],
)
def test_a_damaged_record_is_told_when_it_is_opened(built, tmp_path, change, place):
    with pytest.raises(UserError, match=rf"config\.json is damaged at {place}; make the dashboards again"):
        load_scan(damaged(built[0], tmp_path, change))


def test_damaged_files_of_a_scan_are_told(built, tmp_path):
    folder = damaged(built[0], tmp_path, lambda config: None) / FOLDER
    lines = (folder / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    for text in ("\n".join(lines[:-1]), "\n".join([*lines[:-1], "{"]), "\n".join([*lines[:-1], "3"])):
        (folder / "prompts.jsonl").write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match=r"prompts\.jsonl is damaged: the scan is of 7 prompts"):
            load_scan(tmp_path)
    (folder / "prompts.jsonl").write_text("\n".join(lines), encoding="utf-8")
    write_tensors(folder / "img-1.safetensors", [("peak", np.dtype("float32"), (40,))], [np.zeros(40, np.float32)])
    with pytest.raises(UserError, match=r"img-1\.safetensors is damaged: it has no active"):
        load_scan(tmp_path).of("img/1/f3")
    (folder / "img-1.safetensors").unlink()
    with pytest.raises(UserError, match=r"img-1\.safetensors cannot be read \(No such file or directory\)"):
        load_scan(tmp_path).of("img/1/f3")


def test_maps_are_packed_whichever_way_is_shorter():
    for cells in (np.zeros(9, np.uint8), np.arange(9, dtype=np.uint8), np.eye(1, 600, 300, np.uint8)[0] * 7):
        text = pages.packed(cells)
        raw = np.frombuffer(base64.b64decode(text[1:]), np.uint8)
        back = np.zeros(len(cells), np.uint8)
        if text[0] == "d":
            back[:] = raw
        else:
            place = raw.reshape(-1, 3)
            back[256 * place[:, 0].astype(int) + place[:, 1]] = place[:, 2]
        assert np.array_equal(back, cells) and (text[0] == "s") == (3 * np.count_nonzero(cells) < len(cells))


def test_bytes_that_are_told_are_those_that_are_taken(built):
    out, _, _ = built
    one = small()
    sizes = sizes_of(one.corpus.pipe.config, one.corpus.run, one.tcs.sites, 40, len(PROMPTS), OPTIONS)
    found = first_pass.empty_scan(one.corpus, one.tcs, top=3, sample=5)
    assert state_bytes(sizes) == sum(leaf.nbytes for leaf in jax.tree.leaves(found.states))
    told, written = disk_bytes(sizes), {path: path.stat().st_size for path in out.rglob("*") if path.is_file()}
    record = sum(size for path, size in written.items() if path.suffix == ".safetensors")
    assert told.record <= record <= told.record + 8 * 2000  # heads of files
    data = sum(size for path, size in written.items() if "data" in Path(path).parts)
    assert 0.3 < (data - len(HOSTILE) * 2) / (told.pages + told.pictures) < 3


def test_transcoders_of_another_type_are_another_scan():
    corpus, tcs = small().corpus, small().tcs
    rounded = tcs._replace(stacks=cast(tcs.stacks, jnp.bfloat16))
    assert rounded.source == tcs.source
    assert identity_of(corpus, rounded, OPTIONS) != identity_of(corpus, tcs, OPTIONS)


def test_one_feature_s_page_is_one_file_with_its_own_data_alone(built):
    out, _, _ = built
    page = feature_page(out, Feature("img", 1, 3))
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in page and "default-src 'none'" in page
    assert "src=" not in page.partition("<script>")[0] and not re.search(r"<link[^>]*\.css", page)
    made = {}
    for call in re.findall(r"^difffract\.(\w+)\((.*)\);$", script, re.MULTILINE):
        made.setdefault(call[0], []).append(json.loads(f"[{call[1]}]".replace("<\\/", "</").replace("<\\!", "<!")))
    assert made["only"] == [["img/1/f3"]]
    record = calls(out / "data" / "img-1" / "0000.js")[2]["3"]
    assert made["features"] == [["img/1", 0, {"3": record}]]
    assert {site: columns["feature"] for site, columns in made["list"]} == {
        name: [3] if name == "img/1" else [] for name in places(small())
    }
    shown = {number for _, prompts in made["prompts"] for number in prompts}
    assert shown == {str(one[0]) for one in record["examples"]}
    ((pictures,),) = made["pictures"]
    assert set(pictures) == {"data/thumbs/0000.png", "data/img-1/0000.png"}
    for path, address in pictures.items():
        assert base64.b64decode(address.partition(",")[2]) == (out / path).read_bytes()
    assert HOSTILE not in page and len(page) < 200_000


def test_a_page_that_is_not_there_is_told(built, tmp_path):
    out, _, _ = built
    with pytest.raises(UserError, match="has no site img/9"):
        feature_page(out, Feature("img", 9, 3))
    with pytest.raises(UserError, match="has no page of img/1/f99; scan it"):
        feature_page(out, Feature("img", 1, 99))
    with pytest.raises(UserError, match="holds no scan of features"):
        dfx.feature("img/1/f3", pages=tmp_path)
    copy = tmp_path / "copy"
    shutil.copytree(out, copy)
    (copy / "data" / "thumbs" / "0000.png").unlink()
    with pytest.raises(UserError, match=r"0000\.png is missing"):
        feature_page(copy, Feature("img", 1, 3))
    index = (copy / "data" / "index.js").read_text(encoding="ascii")
    for changed in ("difffract.index({})", index.replace('"kind":"png"', '"kind":"/../../other.png"')):
        assert changed != index
        (copy / "data" / "index.js").write_text(changed, encoding="ascii")
        with pytest.raises(UserError, match="The data in .* are damaged; make the dashboards again"):
            feature_page(copy, Feature("img", 1, 3))
    (copy / "data" / "index.js").write_text("difffract.index({", encoding="ascii")
    with pytest.raises(UserError, match=r"index\.js is missing or damaged"):
        feature_page(copy, Feature("img", 1, 3))


def test_a_feature_shows_its_page_from_a_folder_or_from_a_scan(built, tmp_path):
    out, _, _ = built
    kept = dfx.feature("img/1/f3@2#1", pages=out)
    assert kept.show().html == feature_page(out, Feature("img", 1, 3)) and repr(kept.scan) == repr(kept)
    scanned = dfx.feature(
        Feature("img", 1, 3), small().corpus.pipe, small().tcs, prompts=PROMPTS, run=small().corpus.run
    )
    assert "a scan of 7 prompts, when it is shown" in repr(scanned)
    page = scanned.show(height=300)
    page.save(tmp_path / "f3.html")
    assert (tmp_path / "f3.html").read_text(encoding="utf-8") == page.html and "height:300px" in page._repr_html_()
    shown = scanned.scan.examples
    assert shown and all(PROMPTS[one.seed] == one.prompt for one in shown), "prompt number n starts from seed n"
    assert scanned.show().html is page.html, "scanned once"


@pytest.mark.parametrize(
    ("name", "given", "said"),
    [
        ("img/f3", {}, "is not a feature"),
        ("img/1/f3", {"pipe": 1}, "give both `pipe` and `tcs`"),
        ("img/1/f3", {"prompts": 0}, "a scan needs prompts"),
        ("img/1/f3", {"prompts": "a fox"}, "a scan needs prompts"),
        ("img/1/f3", {"prompts": []}, "a scan needs prompts"),
    ],
)
def test_what_names_no_scan_is_refused(name, given, said):
    if "pipe" in given:
        given = {"pipe": small().corpus.pipe}
    with pytest.raises(UserError, match=said):
        dfx.feature(name, **given)


def test_a_count_of_prompts_is_the_organism_s_alone(built):
    with pytest.raises(UserError, match="give `prompts` as texts"):
        dfx.feature("img/1/f3", small().corpus.pipe, small().tcs)
    with pytest.raises(UserError, match="give one of them"):
        dfx.feature("img/1/f3", small().corpus.pipe, small().tcs, pages=built[0])
    with pytest.raises(UserError, match="`prompts` and `run` would be for a scan"):
        dfx.feature("img/1/f3", pages=built[0], prompts=8, run=small().corpus.run)
