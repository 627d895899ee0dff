"""SentencePiece models: the contest's own (normalising) and lossless ones (identity normalisation)."""

from pathlib import Path

import numpy as np

from common import UserError, sha256_file

SPACE_SYMBOL = "\u2581"  # SentencePiece writes a space as this character
# A model that gives all of these back byte for byte loses nothing: it neither normalises, nor trims
# or merges spaces, nor adds a dummy prefix, and bytes outside its alphabet fall back to byte tokens.
LOSSLESS_PROBES = ("a", " a", "a  b ", "\n\t\r\0", "\ufb01 \u212a e\u0301 \U0001f600", "\u3000x\u00a0")
# What the contest's own models make of a text: nmt_nfkc, capitals kept, spaces merged and trimmed, no prefix.
CONTEST_PROBE, CONTEST_READS = " A\ufb01 \n\u200b e ", "Afi\u2581e"


class SentencePieceCodec:
    """One SentencePiece model file.

    `token_bytes` follows the contest's rule for its normalising models: a piece counts its UTF-8 bytes
    without the leading space symbol, plus one for that space unless the previous token is a boundary
    (control, unknown, unused) or absent. A lossless model counts every byte it writes.
    """

    kind = "sentencepiece"
    needs_sidecar = False  # whether token_bytes is short of the text's bytes, and encode_with_bytes is not

    def __init__(self, path: str | Path):
        try:
            import sentencepiece
        except ImportError as error:
            raise UserError(f"{path}: reading this tokenizer needs `pip install sentencepiece`.") from error
        try:
            self._sp = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError) as error:
            raise UserError(f"{path}: not a SentencePiece model ({error}). Copy it again.") from error
        sp = self._sp
        self.path = Path(path)
        self.digest = sha256_file(path)
        self.vocab_size = sp.vocab_size()
        self.bos_id = sp.bos_id()
        if self.bos_id < 0:
            raise UserError(f"{path}: the model has no BOS piece; documents could not be told apart.")
        byte_ids = [i for i in range(self.vocab_size) if sp.is_byte(i)]
        self._byte_ids = {i: bytes([int(sp.id_to_piece(i)[1:-1], 16)]) for i in byte_ids}  # pieces are <0x41>
        self._boundary = np.array(
            [sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i) for i in range(self.vocab_size)]
        )
        self._pieces = [self._piece_bytes(i) for i in range(self.vocab_size)]
        has_bytes = len(self._byte_ids) == 256
        self.lossless = has_bytes and all(
            self._join(sp.encode(text, out_type=int)) == text.encode() for text in LOSSLESS_PROBES
        )
        knows_space = self.has_pieces(SPACE_SYMBOL) and not any(b" " in piece[1:] for piece in self._pieces)
        self.by_contest_rule = has_bytes and knows_space and sp.normalize(CONTEST_PROBE) == CONTEST_READS
        self._written_bytes = np.array([len(piece) for piece in self._pieces], dtype=np.int32)
        leading = [sp.id_to_piece(i).startswith(SPACE_SYMBOL) for i in range(self.vocab_size)]
        self._leading_space = np.array(leading) & ~self._boundary
        self._base_bytes = np.array([self._contest_bytes(i) for i in range(self.vocab_size)], dtype=np.int32)

    def has_pieces(self, pieces: str) -> bool:
        """Tell whether each of these characters is a piece of its own."""
        return all(not self._boundary[self._sp.piece_to_id(piece)] for piece in pieces)

    def _piece_bytes(self, token: int) -> bytes:
        if self._boundary[token]:
            return b""
        return self._byte_ids.get(token) or self._sp.id_to_piece(token).replace(SPACE_SYMBOL, " ").encode()

    def _contest_bytes(self, token: int) -> int:
        if self._boundary[token]:
            return 0
        # A space within a piece, which the contest's models do not have, counts one.
        return 1 if token in self._byte_ids else len(self._pieces[token].removeprefix(b" "))

    def _join(self, ids) -> bytes:
        return b"".join(self._pieces[int(i)] for i in ids)

    def encode(self, text: str) -> np.ndarray:
        """Encode one document to (N,) int32 ids, without BOS."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str], num_threads: int = 1) -> list[np.ndarray]:
        """Encode documents in parallel threads; each gives (N,) int32 ids, without BOS."""
        encoded = self._sp.encode(texts, num_threads=num_threads)
        if self.lossless:
            for i, text in enumerate(texts):
                if SPACE_SYMBOL in text:  # its ids would decode to spaces: write the character as byte tokens
                    encoded[i] = self._encode_around_space_symbol(text)
        return [np.array(ids, dtype=np.int32) for ids in encoded]

    def _encode_around_space_symbol(self, text: str) -> list[int]:
        symbol = [self._sp.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_SYMBOL.encode()]
        ids: list[int] = []
        for i, part in enumerate(text.split(SPACE_SYMBOL)):
            ids += (symbol if i else []) + self._sp.encode(part)
        return ids

    def decode(self, ids) -> bytes:
        """Decode ids to text bytes: the original ones exactly if the model is lossless."""
        if self.lossless:
            return self._join(ids)
        return self._sp.decode([int(i) for i in ids]).encode()

    def token_bytes(self, ids: np.ndarray) -> np.ndarray:
        """Count the original UTF-8 bytes that each of (N,) consecutive ids stands for: (N,) int32."""
        ids = np.asarray(ids)
        if self.lossless:
            return self._written_bytes[ids]
        after_boundary = np.ones(ids.shape, dtype=bool)
        after_boundary[1:] = self._boundary[ids[:-1]]
        return self._base_bytes[ids] + (self._leading_space[ids] & ~after_boundary)
