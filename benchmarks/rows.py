"""Raw rows of a real teacher, for experiments with codecs: more entries than any codec keeps, draws, exact sums.

    MALLOC_MMAP_THRESHOLD_=1048576 python -m benchmarks.rows CORPUS.jsonl TEACHER OUT.npz

(the variable keeps glibc from scattering the small results among the large buffers, which grows to 12 GB).

Arrays, R rows over all windows: ``ids`` int32 [R, 128] and ``logprob`` float32 [R, 128] in rank order, ``draws`` int32
[R, 200] ids drawn with replacement, ``draw_logprob`` float32 [R, 200], ``entropy``, ``target_logprob`` and
``space_logprob`` float32 [R], ``rows`` int32 [N] per window, ``target`` int32 [R] the token in the text.
"""

import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xtoken.pipeline.corpus import Corpus, windows
from xtoken.pipeline.teachers import hf_teacher, model_source
from xtoken.pipeline.teachers.logit_rows import top_k
from xtoken.pipeline.tokens import load_tokenizer
from xtoken.schemas.configs.capture import CorpusConfig, TeacherGroup

ENTRIES, DRAWS, WINDOW, BLOCK = 128, 200, 512, 64


def read_block(logits_NU: Tensor, target_N: Tensor, space_P: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """The arrays of the module for N positions."""
    logprob_NU = logits_NU.sub_(logits_NU.logsumexp(dim=-1, keepdim=True))
    top, ids = top_k(logprob_NU, ENTRIES)
    p_NU = logprob_NU.exp()
    draws = torch.multinomial(p_NU, DRAWS, replacement=True, generator=generator)
    return {
        "ids": ids.int(),
        "logprob": top,
        "draws": draws.int(),
        "draw_logprob": logprob_NU.gather(1, draws),
        "entropy": -(p_NU * logprob_NU).sum(dim=-1),
        "target_logprob": logprob_NU.gather(1, target_N[:, None])[:, 0],
        "space_logprob": logprob_NU.index_select(1, space_P).logsumexp(dim=-1).clamp_(max=0.0),
        "target": target_N.int(),
    }


def main() -> None:
    """Score a corpus window by window."""
    corpus, teacher, out = sys.argv[1:4]
    config = TeacherGroup(teacher=teacher)
    tokenizer = load_tokenizer(teacher)
    model = hf_teacher._load(config, model_source.load_model_config(config), torch.device("cpu"))
    source = hf_teacher.pick_source(model)
    info, space = tokenizer.table.info, torch.from_numpy(np.flatnonzero(tokenizer.table.starts_with_space()))
    context = [info.bos_id] if info.adds_bos else []
    found: dict[str, list[Any]] = defaultdict(list)
    generator, began = torch.Generator().manual_seed(0), time.monotonic()
    with torch.inference_mode():
        for document in Corpus(CorpusConfig(corpus=corpus, id_field="id")).documents():
            for window in windows(document, tokenizer, WINDOW):
                ids = torch.tensor([*context, *window.encoded.ids.tolist()])
                states_N = source.states(ids[None], None)[0, :-1]
                for start in range(0, len(states_N), BLOCK):
                    block = slice(start, start + BLOCK)
                    logits_NU = source.logits(states_N[block])
                    for name, value in read_block(logits_NU, ids[1:][block], space, generator).items():
                        found[name].append(value.numpy())
                found["rows"].append(np.array([len(states_N)], np.int32))
            done = sum(int(rows[0]) for rows in found["rows"])
            print(f"{document.id}: {done} rows, {done / (time.monotonic() - began):.0f} rows/s", flush=True)
    np.savez(Path(out), **{name: np.concatenate(values) for name, values in found.items()})


if __name__ == "__main__":
    main()
