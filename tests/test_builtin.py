"""The built-in corpus: made from sources that are never run, the same everywhere, nothing leaked."""

import json
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from fixtures_data import small_texts

import data.builtin
from common import UserError, sha256_file
from data.builtin import (
    Chapter,
    Entry,
    Module,
    build,
    find_package,
    find_shared,
    find_standard_library,
    get_passages,
    hash_name,
    list_docstrings,
    make_corpus,
    parse_module,
    parse_modules,
    walk_modules,
    write_document,
)
from data.codecs import load_codec
from data.prepare import write_dataset
from data.shards import find_shards, read_manifest, read_report, read_shard

LONG = "A sentence that is long enough to be worth remembering, and therefore worth keeping apart."


def chapter(name: str, *docstrings: str, standard: bool = True) -> Chapter:
    return Chapter(name, standard, tuple(Entry(f"{name}.f{i}()", text) for i, text in enumerate(docstrings)))


def name_for(val: bool) -> str:
    """Find a module name that the hash puts into validation, or into training."""
    return next(f"m{i}" for i in range(1000) if (hash_name(f"m{i}") % 10 == 0) == val)


VAL_NAME, TRAIN_NAME = name_for(val=True), name_for(val=False)


@pytest.fixture
def fake_tree(tmp_path):
    """A small standard library of 60 modules with different docstrings, and a test folder."""
    root = tmp_path / "lib"
    for i, text in enumerate(small_texts(60, seed=2)):
        folder = root / ("package" if i % 2 else "") / ""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"module{i}.py").write_text(f"def run(x):\n    {text!r}\n", encoding="utf-8")
    (root / "test").mkdir()
    (root / "test" / "test_x.py").write_text('"""A test, which is left out."""\n')
    return root


@pytest.fixture
def list_modules(fake_tree):
    return lambda: list(walk_modules(fake_tree, "", standard=True))


# ---- Parsing ----------------------------------------------------------------------------------------


def test_docstrings_are_read_in_source_order_without_running_the_module(tmp_path):
    """Importing every module of an environment would run code, and change with the platform."""
    path = tmp_path / "m.py"
    source = '''
        """Top."""
        raise SystemExit("this file was run")
        def first(a, /, b, *rest, c=1, **more):
            """One.

            More:
                Indented.
            """
        class Second:
            """Two."""
            async def method(self):
                """Three."""
        def bare(): pass
    '''
    path.write_text(textwrap.dedent(source))
    (parsed,) = parse_module(Module("p.m", path, standard=True))
    assert parsed.entries == (
        Entry("p.m", "Top."),
        Entry("first(a, b, *rest, c, **more)", "One.\n\nMore:\n    Indented."),
        Entry("Second", "Two."),
        Entry("Second.method(self)", "Three."),
    )
    text = write_document(parsed).text
    assert text.startswith("p.m\n\nTop.\n\nfirst(a, b, *rest, c, **more)\n\nOne.\n")
    assert text.endswith("Second.method(self)\n\nThree.\n")


@pytest.mark.parametrize(
    "source", [b"print 'python 2'", b"x = '\0'", b"\xff\xfe", b"x = 1", b'"""\\ud800"""', b'""" """']
)
def test_files_without_usable_docstrings_are_left_out(tmp_path, source):
    """Templates, other Python versions and half surrogates occur in every environment."""
    path = tmp_path / "m.py"
    path.write_bytes(source)
    assert parse_module(Module("m", path, standard=True)) == []


def test_each_help_topic_is_a_document(tmp_path):
    """The topics are one dictionary; as one document they would be all of validation or none."""
    path = tmp_path / "topics.py"
    path.write_text("topics = {'if': 'The if\\n\\nstatement:\\n   if', 'for': 'The for statement'}\n")
    parsed = parse_module(Module("pydoc_data.topics", path, standard=True))
    assert [write_document(topic).text for topic in parsed] == [
        "The for statement\n",
        "The if\n\nstatement:\n   if\n",
    ]
    assert [topic.name for topic in parsed] == ["pydoc_data.topics.for", "pydoc_data.topics.if"]


def test_modules_are_named_by_their_place_and_tests_are_left_out(fake_tree):
    """The name decides order and split, so it must not depend on where Python is installed."""
    names = [module.name for module in walk_modules(fake_tree, "", standard=True)]
    assert "module0" in names and "package.module1" in names and len(names) == 60
    (fake_tree / "package" / "__init__.py").touch()
    assert "top.package" in [module.name for module in walk_modules(fake_tree, "top", standard=False)]


def test_an_absent_package_adds_nothing():
    """The corpus takes what the environment has."""
    assert find_package("a_package_that_is_not_installed") == []
    assert {module.name for module in find_package("numpy")} >= {"numpy", "numpy.linalg"}


# ---- Splitting --------------------------------------------------------------------------------------


def test_only_the_standard_library_gives_validation():
    """Packages differ between environments; the standard library of one Python version does not."""
    standard, package = chapter(VAL_NAME, "One."), chapter(VAL_NAME, "Two.", standard=False)
    corpus = make_corpus([standard, package])
    assert (corpus.val, corpus.train) == ([standard], [package])


def test_a_repeated_docstring_is_kept_once_and_in_validation_if_it_is_there():
    """Inherited and copied documentation would be learnt by heart."""
    corpus = make_corpus(
        [chapter(TRAIN_NAME, "Same.", "Own."), chapter("m.copy", "Own.", "Same."), chapter(VAL_NAME, "Same.")]
    )
    assert sorted(list_docstrings(corpus.train) + list_docstrings(corpus.val)) == ["Own.", "Same."]
    assert list_docstrings(corpus.val) == ["Same."]


@pytest.mark.parametrize(
    ("train", "val", "is_shared"),
    [
        (LONG, LONG, True),
        (f"Before. {LONG} After.", LONG, True),
        (f"See{LONG}also", LONG, True),
        (LONG, f"Before. {LONG} After.", True),
        ("-" * 90, "-" * 80, True),
        (LONG[:70], f"{LONG[:70]} and so on", False),
        (LONG.replace("long", "short"), LONG, False),
        (f"Before. {LONG}", f"{LONG} After.", True),
    ],
)
def test_training_docstrings_that_share_a_passage_with_validation_are_found(train, val, is_shared):
    """A passage copied into another docstring is as much a leak as a whole one."""
    assert find_shared(["Something else entirely.", train], [val]) == ({train} if is_shared else set())


def test_a_chapter_left_without_docstrings_is_no_document():
    """A heading alone is not text."""
    corpus = make_corpus([chapter(TRAIN_NAME, f"{LONG} After."), chapter(VAL_NAME, LONG)])
    assert corpus.train == [] and len(corpus.val) == 1


@pytest.mark.parametrize("every", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_the_real_standard_library_shares_no_passage_between_validation_and_training(every):
    """The claim of the README, checked the slow and obvious way on what is really installed.

    Parsing all of it takes seconds; every fourth module and the help topics are the same code.
    """
    modules = find_standard_library()
    topics = [module for module in modules if module.name == "pydoc_data.topics"]
    chosen = [module for module in modules if module not in topics][::every]
    corpus = make_corpus(parse_modules(chosen + topics))
    train, val = list_docstrings(corpus.train), list_docstrings(corpus.val)
    assert len(train) > 1000 and len(val) > 50
    all_train = "\0".join(train)
    passages = [passage for docstring in val for passage in get_passages(docstring)]
    assert not [passage for passage in passages[::101] if passage in all_train]
    num_documents = len(corpus.train) + len(corpus.val)
    assert 0.05 < len(corpus.val) / num_documents < 0.15
    assert any(chapter.name.startswith("pydoc_data.topics.") for chapter in corpus.train)


# ---- Building ---------------------------------------------------------------------------------------


def test_the_corpus_is_built_whole_and_a_second_time_nothing_is_done(tmp_path, list_modules):
    """`make data` comes before everything else, so it must cost nothing when it is done."""
    out = tmp_path / "out"
    assert build(out, 360, list_modules)
    manifest = read_manifest(out)
    codec = load_codec(out / "tokenizer.model", vocab_size=360)
    assert manifest["tokenizer"]["sha256"] == codec.digest
    for split in ("train", "val"):
        row, shards = manifest[split], find_shards(out / f"fineweb_{split}_*.bin")
        assert row["raw_bytes"] == row["token_bytes"] == manifest["sources"][f"{split}_bytes"]
        ids = read_shard(shards[0])
        assert int((ids == codec.bos_id).sum()) == row["documents"][1] > 0
    assert "left out" not in codec.decode(ids).decode()

    report = json.loads((out / "tokenizer_report.json").read_text())
    assert report["documents"] == manifest["val"]["documents"][1]
    assert read_report(out, codec.digest) == report["digest"]

    def unexpected():
        raise AssertionError("sources were read again")

    assert not build(out, 360, unexpected)


def test_the_same_sources_give_the_same_files(tmp_path, list_modules):
    """Two machines with one environment train on one corpus."""
    manifests = []
    for name in ("a", "b"):
        build(tmp_path / name, 360, list_modules)
        manifests.append(read_manifest(tmp_path / name))
    assert manifests[0] == manifests[1]


@pytest.mark.parametrize("change", ["version", "vocab_size", "shard", "flip", "tokenizer"])
def test_a_corpus_that_is_outdated_or_damaged_is_made_again(tmp_path, list_modules, monkeypatch, change):
    """Everything that decides the corpus is in the manifest; what is lost is replaced."""
    out, vocab_size = tmp_path / "out", 360
    build(out, vocab_size, list_modules)
    before = read_manifest(out)
    if change == "version":
        monkeypatch.setattr(data.builtin, "CORPUS_VERSION", 99)
    elif change == "vocab_size":
        vocab_size = 370
    elif change == "shard":
        (out / "fineweb_val_000000.bin").unlink()
    elif change == "flip":
        shard = out / "fineweb_train_000000.bin"
        shard.write_bytes(shard.read_bytes()[:-1] + b"\xff")
    else:
        (out / "tokenizer.model").write_bytes(b"damaged")
    assert build(out, vocab_size, list_modules)
    after = read_manifest(out)
    assert after["tokenizer"]["vocab_size"] == vocab_size
    if change in ("shard", "flip", "tokenizer"):
        assert after == before
    assert not build(out, vocab_size, list_modules)


def test_a_corpus_whose_move_was_cut_off_is_put_in_place_not_made_again(tmp_path, list_modules):
    """It is finished: a builder that looks at the files in place alone would take the seconds again."""
    out = tmp_path / "out"
    build(out, 360, list_modules)
    before = read_manifest(out)
    (out / ".ready").mkdir()
    moved = ["fineweb_train_000000.bin", "fineweb_val_000000.bin", "tokenizer.model", "tokenizer_report.json"]
    for name in ("fineweb_val_000000.bin", "manifest.json"):
        (out / name).rename(out / ".ready" / name)
    (out / ".ready" / ".files.json").write_text(json.dumps([*moved, "manifest.json"]))
    assert not build(out, 360, list_modules)
    assert read_manifest(out) == before and find_shards(out / "fineweb_val_*.bin")


@pytest.mark.parametrize("is_built", [True, False])
def test_of_two_builders_the_second_waits_for_the_first(tmp_path, list_modules, capsys, is_built):
    """Two `make run` at once: both work, and the corpus is made once, or by the second if the first fails."""
    out = tmp_path / "out"
    first = threading.Event()

    def slow_modules():
        first.set()
        time.sleep(0.8)
        if not is_built:
            raise UserError("the first fails")
        return list_modules()

    with ThreadPoolExecutor(1) as pool:
        ended = pool.submit(build, out, 360, slow_modules)
        first.wait()
        assert build(out, 360, list_modules) == (not is_built)
        assert isinstance(ended.exception(), UserError if not is_built else type(None))
    assert "Waiting for it" in capsys.readouterr().err
    assert read_manifest(out)["tokenizer"]["vocab_size"] == 360
    assert not list(out.glob(".staging"))


def test_a_corpus_that_cannot_be_built_leaves_the_outdated_one(tmp_path, list_modules):
    """A run may be reading it, and the next call makes it anew."""
    out = tmp_path / "out"
    build(out, 360, list_modules)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(UserError):
        build(out, 100, list_modules)  # fewer entries than bytes
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert not build(out, 360, list_modules)


def test_a_folder_with_another_dataset_is_left_alone(tmp_path, list_modules):
    """A dataset of one's own text may have taken hours."""
    out = tmp_path / "out"
    build(tmp_path / "first", 360, list_modules)
    codec = load_codec(tmp_path / "first" / "tokenizer.model")
    train, val = ([write_document(chapter(name, name))] for name in ("a", "b"))
    write_dataset(out, codec, train, val, {"input": "my own"}, num_threads=1)
    before = {path: sha256_file(path) for path in out.iterdir()}
    with pytest.raises(UserError, match="not the built-in corpus"):
        build(out, 360, list_modules)
    assert {path: sha256_file(path) for path in out.iterdir()} == before
