"""A sequence that ranks share is trained as on one rank: losses, gradients and weights are equal but for rounding."""

from __future__ import annotations

import json

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from sparsetrain_kernels.block_pattern import block_pattern_attention
from training import counted_row
from transformers import AutoConfig, AutoModelForCausalLM

from sparsetrain import sparsify
from sparsetrain.cli import main
from sparsetrain.errors import ModelError, RecipeError, TrainingError
from sparsetrain.methods.power import PowerConfig
from sparsetrain.methods.recycled.method import RecycledConfig
from sparsetrain.modeling.attention.call import AttentionCall
from sparsetrain.modeling.attention.interface import attend_call
from sparsetrain.modeling.head_exchange import deal_heads
from sparsetrain.modeling.ulysses import Ulysses
from sparsetrain.recipe.heads import heads_fault, shares_heads
from sparsetrain.training.distributed.sequence_parallel import check_config, check_shareable, join_sequence_group

SHORT = "train.steps=3"
CHECKPOINTED = "train.activation_checkpointing=layer"
# By name: what is trained, with every ZeRO stage but the first, which shares its code with the second. 255 tokens do
# not divide by two.
CASES = {
    "power": ["deepspeed.stage=3"],
    "sparsek": ["attention={method: sparsek, topk: 16, window: 16, sinks: 2}", "deepspeed.stage=2", SHORT],
    "recycled": [
        "attention={method: recycled, every: [4, 8], keep: 16, sinks: 1, recent: 4, text_prefix: uniform}",
        *("attention.dense_layers=[0]", "sequence.length=255", "deepspeed.stage=2", SHORT),
    ],
    "one-kv-head": [
        "attention={method: sparsek, topk: 16, window: 16, sinks: 2, dense_layers: [0]}",
        *("model.architecture.num_key_value_heads=1", "sequence.length=255", "deepspeed.stage=0", SHORT, CHECKPOINTED),
    ],
    "lora": [
        "attention={method: sparsek, topk: 16, window: 16, sinks: 2, scores: layer, gate: log}",
        *("lora={rank: 4}", "train.lr=0.05", "train.micro_batch=2", "deepspeed.stage=3", SHORT, CHECKPOINTED),
    ],
}
EVALUATION = ["eval.at_end=true", "eval.tasks.passkey={lengths: [160], depths: 2, trials: 2}"]

# Trains with each list of arguments in turn, counts, and last trains with scores that change on their way.
PROGRAM = """
import json, pathlib, sys
from sparsetrain.cli import main
from sparsetrain.modeling import ulysses
from training import counted_row
runs, broken, counts = json.loads(sys.argv[1])
codes = [main(arguments) for arguments in runs]
counted_row.count(pathlib.Path(counts))
deal = ulysses.deal_heads
ulysses.deal_heads = lambda tensors, group: deal([*tensors[:3], *(1.5 * scores for scores in tensors[3:])], group)
sys.exit(max(codes) or main(broken))
"""

FOUR = """
import json, pathlib, sys
from sparsetrain.cli import main
from training import counted_row
arguments, compared = json.loads(sys.argv[1])
code = main(arguments)
counted_row.compare(pathlib.Path(compared))
sys.exit(code)
"""


@pytest.fixture(scope="module")
def arguments(tiny, pretrained):
    """``arguments(name, output, *overrides)``: the command of a case."""

    def command(name, output, *overrides):
        model = {"path": str(pretrained / "untied"), "dtype": "float32"}
        pretrained_model = [f"model={json.dumps(model)}"] if name == "lora" else []
        case = [*pretrained_model, *CASES.get(name, []), *(EVALUATION if name == "sparsek" else [])]
        return ["run", str(tiny), *case, *overrides, "--output", str(output)]

    return command


@pytest.fixture(scope="module")
def alone(arguments, shared, stages, run_folder):
    """The runs of one rank."""
    names = [name for name in CASES if name != "power"]

    def make(folder):
        for name in names:
            assert main(arguments(name, folder / name)) == 0

    folder = shared("sequence-alone", make)
    return {name: run_folder(folder / name) for name in names} | {"power": stages(1)[3]}


@pytest.fixture(scope="module")
def together(arguments, shared, ranks_of, run_folder):
    """The same runs of two ranks that share every sequence, and what they said; the last is broken on purpose."""

    def make(folder):
        runs = [arguments(name, folder / name, "sequence.parallel=2") for name in CASES]
        broken = arguments("sparsek", folder / "broken", "sequence.parallel=2")
        program = ["-c", PROGRAM, json.dumps([runs, broken, str(folder / "counts")])]
        ranks_of(program, folder / "log", 2).wait(TrainingError.exit_code)

    folder = shared("sequence-together", make)
    return {name: run_folder(folder / name) for name in CASES}, (folder / "log").read_text()


def weights(run):
    return load_file(next((run.path / "final").glob("*model.safetensors")))


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_that_share_every_sequence_take_the_steps_of_one(alone, together, name):
    wanted, found = alone[name], together[0][name]
    assert len(found.steps) == (6 if name == "power" else 3)
    # 3e-7 was measured in losses and norms, and 2e-7 in weights.
    assert found.values("loss") == pytest.approx(wanted.values("loss"), rel=2e-6)
    assert found.values("grad_norm") == pytest.approx(wanted.values("grad_norm"), rel=1e-5)
    assert max(found.values("grad_norm")) > 0.5  # clipping has something to get wrong
    assert found.values("tokens") == wanted.values("tokens")
    mine, theirs = weights(found), weights(wanted)
    assert mine.keys() == theirs.keys()
    for tensor in theirs:
        torch.testing.assert_close(mine[tensor], theirs[tensor], rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("method", counted_row.METHODS)
def test_a_rank_holds_its_part_of_a_row(together, rank, method):
    file = together[0]["power"].path.parent / f"counts.{rank}.json"
    shared, alone = (json.loads(file.read_text())[method][name] for name in ("shared", "alone"))
    # In attention all tokens of half of the heads, with keys and values; nothing of all tokens and the hidden size, and
    # nothing of tokens by tokens.
    assert shared["largest"] < 2 * counted_row.TOKENS * counted_row.WIDTH * 4
    # 1.22 at most was measured; 2 without a part of a row.
    assert shared["peak"] < 1.4 * alone["peak"]
    # Labels have one token more.
    assert shared["data"] == 8 * (counted_row.TOKENS + 1)


def test_observations_and_evaluation_are_those_of_one_rank(alone, together):
    wanted, found = alone["sparsek"], together[0]["sparsek"]
    support = "sparsek/support_size/layer_01"
    assert found.values(support) == pytest.approx(wanted.values(support), rel=1e-4)
    results = [json.loads((run.path / "evaluation.json").read_text()) for run in (wanted, found)]
    assert results[0]
    assert results[0] == results[1]


def test_a_run_says_how_rows_are_shared_and_proves_it(together):
    _, log = together
    assert "1 row x 4 accumulation x 1 group of 2 ranks = 4 rows" in log
    assert log.count("self-check: a sequence over 2 ranks equals one rank's on") == len(CASES)


def test_a_sequence_that_is_not_that_of_one_rank_never_takes_a_step(together, run_folder):
    runs, log = together
    broken = run_folder(runs["sparsek"].path.parent / "broken")
    assert "self-check failed: a sequence over 2 ranks differs from one rank's by" in log
    assert broken.steps == []


@pytest.fixture(scope="module")
def four(arguments, shared, ranks_of):
    """The folder of what four ranks do: two groups of them train, and all share a row; and what they said."""

    def make(folder):
        groups = ("sequence.parallel=2", "deepspeed.stage=2", "train.schedule=constant", SHORT)
        given = json.dumps([arguments("groups", folder / "run", *groups), str(folder / "compared")])
        ranks_of(["-c", FOUR, given], folder / "log", 4).wait()

    return shared("sequence-four", make)


@pytest.mark.parametrize("method", counted_row.METHODS)
def test_four_ranks_that_share_a_row_have_the_gradient_of_one(four, method):
    """Beside a dense layer; 250 tokens do not divide by four."""
    of_ranks = [json.loads((four / f"compared.{rank}.json").read_text())[method] for rank in range(4)]
    for found in of_ranks:
        assert found["loss"] < 1e-6
        assert found["gradient"] < 1e-5
    # Queries, keys and values of a rank's tokens into attention, the output out of it, and the same back.
    tokens, head = 63, 4 * counted_row.WIDTH // 8
    into, out = (8 + 2 * 4) * head * tokens, 8 * head * tokens
    # A token's scores of SparseK for one rank are beside them, in 64 bytes.
    sparse = into + (4 * tokens * 64 if method == "sparsek" else 0)
    assert [found["sent"] for found in of_ranks] == [[into, out, sparse, out, out, sparse, out, into]] * 4


def test_four_ranks_make_two_groups(four, stages, run_folder):
    """Groups read rows of their own, and the ranks of a group the parts of the same."""
    found, wanted = run_folder(four / "run"), stages(1)[2]
    assert "1 row x 2 accumulation x 2 groups of 2 ranks = 4 rows" in (four / "log").read_text()
    # The schedules meet in the warmup alone; the losses of three steps follow from two.
    assert found.values("loss") == pytest.approx(wanted.values("loss")[:3], rel=2e-6)
    assert found.values("grad_norm")[:2] == pytest.approx(wanted.values("grad_norm")[:2], rel=1e-5)


@pytest.fixture
def ulysses(world, tiny_recipe):
    """A group of this process alone."""
    return Ulysses(dist.group.WORLD)


def test_without_sequence_parallelism_there_is_no_group(world, tiny_recipe):
    assert join_sequence_group(tiny_recipe()) is None


def test_every_process_exchanges_in_the_same_order(ulysses, monkeypatch):
    """A set of names has another order in every process."""
    names, sent = frozenset(f"input_{index}" for index in range(20)), []
    monkeypatch.setattr("sparsetrain.modeling.ulysses.deal_heads", lambda given, group: sent.extend(given) or given)
    query = torch.ones(1, 2, 4, 8)
    given = {name: name for name in names}

    def attend(module, call):
        assert call.extra == given
        return call.query.transpose(1, 2)

    call = AttentionCall(query, query, query, scale=1.0, cu_seqlens=1, extra=given)
    out = ulysses(attend, torch.nn.Identity(), call)
    assert sent[3:] == sorted(names)
    assert torch.equal(out, query.transpose(1, 2))


def test_kernels_read_rows_where_the_exchange_leaves_them(ulysses):
    """The Hopper kernels copy what TMA cannot read, or what cannot be gathered 16 bytes at a time."""
    tokens, heads = 6, {"query": 4, "key": 2, "value": 2}
    given = [torch.randn(1, tokens, count, 64).bfloat16().transpose(1, 2) for count in heads.values()]
    scores = torch.randn(1, 3, tokens)
    query, key, value, dealt = deal_heads([*given, scores], ulysses.group)
    assert torch.equal(dealt, scores)
    assert len({each.untyped_storage().data_ptr() for each in (query, key, value, dealt)}) == 1
    for found, wanted in zip((query, key, value), given):
        assert torch.equal(found, wanted)
        assert found.stride(-1) == 1
        assert found.data_ptr() % 16 == 0
        assert all(stride % 16 == 0 for stride in found.stride()[:3])


def test_backward_keeps_what_was_received_and_no_copy_of_it(ulysses):
    tokens, documents = 32, torch.tensor([0, 32], dtype=torch.int32)
    query, key, value = (torch.randn(1, tokens, heads, 8).transpose(1, 2).requires_grad_() for heads in (4, 2, 2))
    pattern, kept = PowerConfig(block=16).pattern(), {}

    def attend(module, call):
        out = block_pattern_attention(call.query, call.key, call.value, pattern, cu_seqlens=call.cu_seqlens)
        return out.transpose(1, 2).contiguous()

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    call = AttentionCall(query, key, value, scale=8**-0.5, cu_seqlens=documents)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        ulysses(attend, torch.nn.Identity(), call)
    received, out, lse = (4 + 2 + 2) * 8, 4 * 8, 4
    assert sorted(kept.values()) == sorted([documents.nbytes, *(4 * tokens * size for size in (received, out, lse))])


def test_a_tensor_without_a_gradient_gets_none(ulysses):
    query, key = (torch.randn(1, 2, 4, 8).requires_grad_(needed) for needed in (True, False))
    dealt = deal_heads([query, key, query], ulysses.group)
    assert [each.requires_grad for each in dealt] == [True, False, True]
    (dealt[0] * 2 + dealt[1]).sum().backward()
    assert torch.equal(query.grad, torch.full_like(query, 2))
    assert key.grad is None


@pytest.mark.parametrize("missing", ["documents", "padding"])
def test_documents_of_the_whole_sequence_are_required(ulysses, missing):
    query = torch.ones(1, 2, 4, 8)
    mask = torch.ones(1, 4, dtype=torch.bool) if missing == "padding" else None
    bounds = torch.tensor([0, 4]) if missing == "padding" else None
    call = AttentionCall(query, query, query, scale=1.0, padding=mask, cu_seqlens=bounds)
    with pytest.raises(ModelError, match="needs cu_seqlens of the whole sequence, and no attention mask"):
        ulysses(attend_call, torch.nn.Identity(), call)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "fitting"),
    [(32, 8, [1, 2, 4, 8, 16, 32]), (6, 3, [1, 3, 6]), (14, 2, [1, 2, 14]), (28, 4, [1, 2, 4, 28])],
)
def test_the_heads_say_how_many_ranks_can_share(heads, kv_heads, fitting):
    assert [size for size in range(1, 40) if shares_heads(size, heads, kv_heads)] == fitting
    fault = heads_fault(5, heads, kv_heads)
    assert f"{heads} query and {kv_heads} key/value heads" in fault
    assert f"{', '.join(map(str, fitting))} can." in fault


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["sequence.parallel=3"], "3 ranks cannot share a sequence of a model with 4 query and 2 key/value heads"),
        (
            ["sequence.parallel=2", "attention={method: sparsek, topk: 16, window: 16, scorer: random}"],
            "attention.scorer=random computes scores from the head's index",
        ),
        (
            ["sequence.parallel=2", "attention={method: longnet, block: 16, head_shift: true}"],
            "attention.method=longnet gives each head its own pattern",
        ),
        (
            ["sequence.parallel=4", "attention.method=recycled"],
            "chooses keys by all query heads of a key/value head, of which there are 2",
        ),
    ],
)
def test_what_ranks_cannot_do_together_is_refused_with_the_recipe(tiny_recipe, overrides, expected):
    with pytest.raises(RecipeError, match=r"sequence\.parallel") as error:
        tiny_recipe(*overrides)
    assert expected in str(error.value)


def test_a_model_from_elsewhere_has_too_few_heads_for_the_method():
    config = AutoConfig.for_model("llama", num_attention_heads=8, num_key_value_heads=2)
    check_config(config, 2, RecycledConfig())
    check_config(config, 4, PowerConfig())
    with pytest.raises(ModelError, match=r"sequence\.parallel=4: attention\.method=recycled .* set it to 2 or less"):
        check_config(config, 4, RecycledConfig())


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"num_attention_heads": 6, "num_key_value_heads": 3}, "6 query and 3 key/value heads: .* 1, 3, 6 can"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            r"rotary embedding of the model \(dynamic\) depends on the longest position",
        ),
        (
            {"model_type": "lfm2", "layer_types": ["conv", "full_attention"]},
            "Lfm2ForCausalLM also mixes tokens outside attention",
        ),
    ],
)
def test_a_model_that_would_compute_something_else_is_refused(fields, expected):
    shape = {"hidden_size": 48, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    size = {"vocab_size": 32, "num_hidden_layers": 2}
    config = AutoConfig.for_model(**{"model_type": "llama", **shape, **size, **fields})
    model = sparsify(AutoModelForCausalLM.from_config(config), {"method": "power", "block": 16})
    check_shareable(model, 1)
    with pytest.raises(ModelError, match=expected):
        check_shareable(model, 2)
