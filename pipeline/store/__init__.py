"""What lies on disk: the codec, Parquet files, commit records, and checks of all three."""

from xtoken.pipeline.store.codec import NO_REST, STEP, Packed, Unpacked, decode, decode_tau_rest, encode
from xtoken.pipeline.store.files import DiskFull, Folder, StopRun
from xtoken.pipeline.store.inspect import inspect
from xtoken.pipeline.store.publish import Figures, clean, commit, committed, data_name, publish_part
from xtoken.pipeline.store.reader import iter_capture, iter_parquet, load_vocab, read_table
from xtoken.pipeline.store.verify import verify
from xtoken.pipeline.store.writer import Sample, capture_batch, list_column, write_parquet

__all__ = [
    "NO_REST",
    "STEP",
    "DiskFull",
    "Figures",
    "Folder",
    "Packed",
    "Sample",
    "StopRun",
    "Unpacked",
    "capture_batch",
    "clean",
    "commit",
    "committed",
    "data_name",
    "decode",
    "decode_tau_rest",
    "encode",
    "inspect",
    "iter_capture",
    "iter_parquet",
    "list_column",
    "load_vocab",
    "publish_part",
    "read_table",
    "verify",
    "write_parquet",
]
