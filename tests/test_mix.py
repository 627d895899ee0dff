"""The context-mixing coder: every text comes back, with the same bytes on every machine, or a reason."""

import re
import zlib
from pathlib import Path

import pytest
from fixtures_model import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from audit.folder import SubmissionFolder
from audit.program import read_program
from common import UserError
from pack.mix import DECODER_NAME, MAX_LENGTH, decode, decoder_text, encode, shipped_decoder
from pack.program import PackingError, escape, pack, spell_ascii, unwrap, wrap

PROGRAM = "def double(number):\n\treturn number + number\nprint(double(21), __name__)\n"
ASCII = st.text(st.characters(max_codepoint=127), max_size=60)


def opaque(folder: Path, packed: bytes) -> list[str]:
    """What the audit cannot read of a folder that holds only this program."""
    (folder / "train_gpt.py").write_bytes(packed)
    return read_program(SubmissionFolder(folder), {}, "").opaque


@settings(deadline=None, max_examples=40)
@given(ASCII)
def test_every_ascii_text_comes_back(text):
    """Source is ASCII: the coder takes no other, and loses none of it."""
    assert decode(encode(text), len(text)) == text


def test_the_empty_text_has_an_empty_payload():
    """A text's length travels beside its payload: its end is not stored."""
    assert encode("") == "" and decode("", 0) == ""


def test_the_shipped_decoder_reads_what_the_encoder_wrote():
    """What ships is another spelling of the same functions: short names, no blanks."""
    names = {}
    exec(decoder_text(), names)
    text = Path(__file__).read_text()[:1500]
    assert names[DECODER_NAME](encode(text), len(text)) == text


def test_bytes_are_the_same_everywhere():
    """A record's program must unpack on machines and Python versions that nobody here has tried."""
    assert zlib.crc32(encode(PROGRAM * 9).encode("latin-1")) == 1945276582


def test_payload_needs_no_escapes():
    """A literal holds every character but three; quotes in a row are too rare to matter."""
    payload = encode(Path(__file__).read_text()[:1500]).encode("latin-1")
    assert not set(payload) & {0, 13, 92}
    assert len(escape(payload)) <= len(payload) + len('""""""') + 1


def test_progress_is_reported_to_the_end():
    """Long work shows that it moves."""
    heard = []
    encode("x = 1\n" * 400, heard.append)
    assert heard == sorted(heard) and len(heard) == 3 and heard[-1] == 1


@pytest.mark.parametrize("text", ["\u00e9", "x" * (MAX_LENGTH + 1)])
def test_what_the_decoder_would_not_read_is_refused(text):
    """Found when packing, not when a packed program starts."""
    with pytest.raises(UserError, match="characters of ASCII"):
        encode(text)


def test_characters_beyond_ascii_become_escapes_or_a_reason(tmp_path):
    """Only in a string literal does an escape mean the character."""
    entry = tmp_path / "train_gpt.py"
    entry.write_text("print('\u2581 \u00e9')\n")
    pack(None, tmp_path / "packed.py", entry, "mix")
    assert "\\u2581 \\xe9" in unwrap((tmp_path / "packed.py").read_bytes())
    for source in ("\u00e9 = 1\n", "x = r'\u2581'\n"):
        with pytest.raises(PackingError, match="plain string literals"):
            spell_ascii(source)


def test_a_flipped_payload_is_an_error_and_a_suspicion(tmp_path):
    """Damage decodes to noise: the program must not run it, and an audit must not read it as source."""
    packed = wrap(PROGRAM, "mix")
    place = packed.index(b"s=") + 20
    flipped = packed[:place] + bytes([packed[place] ^ 1]) + packed[place + 1 :]
    with pytest.raises(PackingError, match="checksum"):
        unwrap(flipped)
    assert opaque(tmp_path, packed) == []
    assert "train_gpt.py > exec" in opaque(tmp_path, flipped)[0]


def altered(change: str) -> bytes:
    """A packed program that is not what the packer writes."""
    packed = wrap(PROGRAM, "mix")
    if change == "decoder":
        text = decoder_text().replace("* .001", "* .002").replace("253", "254").encode()
        stream = zlib.compressobj(9, zlib.DEFLATED, -15)
        literal = escape(stream.compress(text) + stream.flush())
        return re.sub(rb'""".*?"""', lambda found: literal, packed, count=1, flags=re.DOTALL)
    if change == "length":
        return packed.replace(b",%d)" % len(PROGRAM), b",%d)" % (MAX_LENGTH + 1))
    return packed.replace(b"\nn=", b"\n%s=print\nn=" % DECODER_NAME.encode(), 1)


def test_a_program_of_a_former_decoder_is_still_read(tmp_path):
    """Records stay as they are: their decoder is known by its text's hash."""
    path = ROOT / "records/track_cpu/2026-11-21_Sp2048_LoraScoring/train_gpt.py"
    assert opaque(tmp_path, path.read_bytes()) == []
    assert "def main(" in unwrap(path.read_bytes())


def test_no_other_text_is_run_as_a_decoder():
    """Its hash, or its tree, is one of ours: nothing else is executed."""
    assert shipped_decoder(decoder_text()) is decode
    assert shipped_decoder("raise SystemExit('ran')") is None


@pytest.mark.parametrize("change", ["decoder", "length", "another statement"])
def test_audit_decodes_only_what_ships_our_decoder_and_nothing_else(change, tmp_path):
    """Another decoder could show the audit a text that does not run."""
    assert any("exec of" in reason for reason in opaque(tmp_path, altered(change)))


def test_the_recipe_chooses_the_compression_unless_the_caller_does(tmp_path):
    """So every command that packs a record's recipe writes the same bytes."""
    (tmp_path / "train_gpt.py").write_text("PACKED_RECIPE: dict | None = None\nprint(PACKED_RECIPE)\n")
    (tmp_path / "recipe.toml").write_text('[quant]\ncode_wrap = "mix"\n')
    for method, library in (("", b"zlib"), ("lzma", b"lzma")):
        pack(tmp_path / "recipe.toml", tmp_path / "packed.py", tmp_path / "train_gpt.py", method)
        assert (tmp_path / "packed.py").read_bytes().startswith(b"#coding:L1\nimport " + library)


@pytest.mark.slow
def test_a_packed_bundle_is_a_seventh_smaller_than_with_brotli(tmp_path):
    """What the longer packing buys, on the program of the naive baseline."""
    recipe = ROOT / "records/track_10min_16mb/2026-03-17_NaiveBaseline/recipe.toml"
    sizes = {}
    for method in ("brotli", "mix"):
        sizes[method] = pack(recipe, tmp_path / "packed.py", method=method).packed_bytes
    assert sizes["mix"] < sizes["brotli"] * 6 / 7
