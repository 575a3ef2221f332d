"""Branch rows: the tree of branches gives what plain passes over text and branch give."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from xtoken.benchmarks.lab.branch_tree import ENTRY, FIRST, SECOND, Tree

DIGITS = torch.arange(20, 30)


def model_and_text() -> tuple[LlamaForCausalLM, list[int]]:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():  # rows that differ from each other
        model.lm_head.weight *= 12
        model.lm_head.weight[20:30] *= 2
    return model, torch.randint(40, (17,)).tolist()


@torch.inference_mode()
def test_a_tree_is_as_many_plain_passes() -> None:
    model, text = model_and_text()

    def digits_after(ids: list[int]) -> torch.Tensor:
        return model(torch.tensor([ids])).logits[0, -1].softmax(-1)[DIGITS]

    at = [4, 11, 16]
    output = model(torch.tensor([text]), use_cache=True)
    tree = Tree(model, output.past_key_values, len(text), DIGITS)
    first_P10 = output.logits[0].softmax(-1)[:, DIGITS][at]
    found = list(tree.numerals(at, first_P10))
    nodes, longest = 0, 0
    for place, numerals in zip(at, found, strict=True):
        wanted = {}
        for d, mass in enumerate(digits_after(text[: place + 1]).tolist()):
            if mass < FIRST:
                continue
            after = digits_after([*text[: place + 1], 20 + d])
            wanted[str(d)], nodes = mass * (1 - float(after.sum())), nodes + 1
            for e, next_mass in enumerate(after.tolist()):
                if mass * next_mass < SECOND:
                    continue
                last = digits_after([*text[: place + 1], 20 + d, 20 + e])
                wanted[f"{d}{e}"], nodes = mass * next_mass * (1 - float(last.sum())), nodes + 1
                wanted |= {f"{d}{e}{f}": mass * next_mass * float(last[f]) for f in range(10)}
        kept = {name: mass for name, mass in wanted.items() if mass >= ENTRY}
        assert kept.keys() == numerals.keys()
        longest = max([longest, *map(len, kept)])
        for name, mass in kept.items():
            assert abs(numerals[name] - mass) < 1e-6, name
    assert tree.nodes == nodes
    assert longest == 3
