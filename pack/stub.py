"""The few lines around a packed program: they unpack it, register its source in linecache and run it.

The entry in linecache lets inspect.getsource (Triton, torch.compile) and traceback find the program's lines;
without a modification time it outlives linecache.checkcache. The file name holds a checksum: two packed
programs in one process keep their own lines.
"""

import ast

from pack.mix import DECODER_NAME

STUB = (
    b"#coding:L1\nimport %(library)s as L,linecache as c\n%(unpack)s\n"
    b'n="<packed %(checksum)s>"\nc.cache[n]=0,None,s.splitlines(1),n\nexec(compile(s,n,"exec"))'
)
UNPACK = {  # library, and the statements that bind s to the program
    "brotli": (b"brotli", b's=L.decompress(%(literal)s.encode("L1")).decode()'),
    "lzma": (  # FORMAT_RAW, FILTER_LZMA2: the stream itself holds lc, lp and pb
        b"lzma",
        b's=L.decompress(%(literal)s.encode("L1"),3,None,[{"id":33}]).decode()',
    ),
    "mix": (  # a raw deflate stream defines the decoder
        b"zlib",
        b'exec(L.decompress(%(decoder)s.encode("L1"),-15))\n'
        b"s=" + DECODER_NAME.encode() + b"(%(literal)s,%(length)d)",
    ),
}


def make_stub(method: str, checksum: int, **values: bytes | int) -> bytes:
    """Fill in the stub; `values` are what the method's statements name."""
    library, unpack = UNPACK[method]
    filled = unpack % {name.encode(): value for name, value in values.items()}
    return STUB % {b"library": library, b"unpack": filled, b"checksum": b"%08x" % checksum}


def is_mix_stub(tree: ast.Module) -> bool:
    """Whether a program is, its literals aside, the stub of method mix and nothing else."""
    ours = ast.parse(make_stub("mix", 0, decoder=b'""', literal=b'""', length=0))
    return len(tree.body) == len(ours.body) and _shape(tree) == _shape(ours)


def _shape(tree: ast.Module) -> list[list]:
    """List each node's type, names and number of children, in order of breadth; literals have no value."""
    return [
        [type(node), len(list(ast.iter_child_nodes(node)))]
        + [value for name, value in ast.iter_fields(node) if name != "value" and isinstance(value, str)]
        for node in ast.walk(tree)
    ]
