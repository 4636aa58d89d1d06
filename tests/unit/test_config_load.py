"""Reading a config: parents, overrides, choices, and the messages of refusals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from fedpeft_dist.config import schema
from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.config.load import (
    default_run_name,
    dump_config,
    load_config,
    parse_config,
    result_keys,
    with_values,
)
from fedpeft_dist.config.yaml_text import read_yaml

CONFIGS = Path(__file__).parents[2] / "configs"
Load = Callable[..., schema.RunConfig]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """load(text, *overrides): the config that a file with this text makes; it lies in a folder of its own."""

    def write_and_load(text: str, *overrides: str) -> schema.RunConfig:
        path = tmp_path / "config.yaml"
        path.write_text(text, encoding="utf-8")
        return load_config(path, overrides)

    return write_and_load


def refusal(load: Load, text: str, *overrides: str) -> str:
    """The message that a config is refused with: always one line."""
    with pytest.raises(ConfigError) as caught:
        load(text, *overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- extends -----------------------------------------------------------------------------------------------------


def test_chain_of_parents(load: Load, tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "grandparent.yaml").write_text("seed: 7\nfederation: {rounds: 3, cohort: 2}\n")
    (tmp_path / "parent.yaml").write_text("extends: deep/grandparent.yaml\nfederation: {rounds: 5}\n")
    config = load("extends: parent.yaml\nfederation: {evaluate_every: 2}\n")
    assert (config.seed, config.federation.cohort) == (7, 2)
    assert (config.federation.rounds, config.federation.evaluate_every) == (5, 2)


def test_parent_is_found_beside_the_child_wherever_one_stands(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "parent.yaml").write_text("seed: 7\n")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert load("extends: parent.yaml\n").seed == 7


def test_cycle(load: Load, tmp_path: Path) -> None:
    (tmp_path / "other.yaml").write_text("extends: config.yaml\n")
    for parent in ("config.yaml", "other.yaml"):
        message = refusal(load, f"extends: {parent}\n")
        assert "config.yaml" in message
        assert "extends itself" in message


def test_missing_parent_names_the_nearest_file(load: Load, tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("seed: 7\n")
    message = refusal(load, "extends: bsae.yaml\n")
    assert "bsae.yaml: no such config file" in message
    assert "did you mean base.yaml?" in message


def test_what_the_choices_of_a_key_say_about_one_value_is_one_clause(load: Load) -> None:
    told = refusal(load, "runtime: {cache: 0, lanes: -1}\n")
    assert told.count("runtime.cache: 0: ") == told.count("runtime.lanes: -1: ") == 1
    assert "'auto' or 'none', or input should be greater than or equal to 1" in told


@pytest.mark.parametrize("parent", ["3", "[a.yaml, b.yaml]", "{file: a.yaml}"])
def test_parent_is_one_path(load: Load, parent: str) -> None:
    assert "extends" in refusal(load, f"extends: {parent}\n")


# --- files that are no config ------------------------------------------------------------------------------------


def test_empty_file_is_the_defaults(load: Load) -> None:
    assert load("# nothing\n") == schema.RunConfig()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- a\n- b\n", "not a list"),
        ("just words\n", "not a str"),
        ("a: [1\n", "not valid YAML"),
        ("seed: !!python/object/apply:os.getpid []\n", "not valid YAML"),
        ("seed: 1\nseed: 2\n", "'seed' is given twice"),
        ("client: {epochs: 1, epochs: 2}\n", "'epochs' is given twice"),
        ("data: {partition: {name: dirichlet, alpha: 1.0, alpha: 2.0}}\n", "'alpha' is given twice"),
        ("client: &a {epochs: 1}\nserver: {<<: *a, <<: *a}\n", "'<<' is given twice"),
        ("client: &a {epochs: 1}\nserver: {<<: *a, lr: 1, lr: 2}\n", "'lr' is given twice"),
        ("client: &a {optimizer: *a}\n", "an alias stands inside of what it names"),
        ("client: &a {<<: *a}\n", "an alias stands inside of what it names"),
        ("client: {<<: 3}\n", "<< takes mappings"),
        ("client: &a {epochs: 1}\nserver: {<<: [*a, 3]}\n", "<< takes mappings"),
    ],
    ids=[
        *("list", "text", "syntax", "python tag", "twice", "twice in a section", "twice, deeper", "merged twice"),
        *("twice beside a merge", "alias of itself", "merge of itself", "merge of a number", "merge of more"),
    ],
)
def test_files_that_are_no_config(load: Load, text: str, words: str) -> None:
    message = refusal(load, text)
    assert words in message
    assert "config.yaml" in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{<<: *a, z: 3}", {"x": 1, "y": 2, "z": 3}),
        ("{<<: *a, x: 3}", {"x": 3, "y": 2}),
        ("{x: 3, <<: *a}", {"x": 3, "y": 2}),
        ("&c {<<: *b}\ne: {<<: *c}", {"x": 4, "y": 2}),
        ("{<<: [*b, *a]}", {"x": 4, "y": 2}),
    ],
    ids=["beside a key", "under a key", "after a key", "merge of a merge", "two at once"],
)
def test_merged_sections_yield_to_their_own_keys(tmp_path: Path, text: str, expected: dict[str, int]) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(f"a: &a {{x: 1, y: 2}}\nb: &b {{<<: *a, x: 4}}\nd: {text}\n")
    tree = read_yaml(path)
    assert tree["d"] == expected
    assert tree.get("e", expected) == expected
    assert (tree["a"], tree["b"]) == ({"x": 1, "y": 2}, {"x": 4, "y": 2})


def test_a_merge_makes_a_config(load: Load) -> None:
    text = "client: {optimizer: &a {name: sgd, lr: 0.5}}\nserver: {optimizer: {<<: *a, momentum: 0.25}}\n"
    assert load(text).server.optimizer == schema.ServerSgdConfig(name="sgd", lr=0.5, momentum=0.25)


@pytest.mark.parametrize("value", ["2024-01-01", "2024-01-01T10:00:00", "2024-01-01 10:00:00", "'20240101'", "v1.5"])
def test_text_is_taken_as_it_is_written(load: Load, value: str) -> None:
    for config in (load(f"output: {{name: {value}}}\n"), load("", f"output.name={value}")):
        assert config.output.name == value.strip("'")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("20240101", "output.name: 20240101: YAML reads this as a number"),
        ("1.5", "output.name: 1.5: YAML reads this as a number"),
        ("1e5", "number, not as text; put it in quotes"),
        ("yes", "output.name: True: YAML reads this as a boolean, not as text; put it in quotes"),
        ("[a]", "output.name: ['a']: should be text"),
    ],
)
def test_text_that_yaml_reads_otherwise_is_to_be_quoted(load: Load, value: str, words: str) -> None:
    assert words in refusal(load, f"output: {{name: {value}}}\n")
    assert words.replace("output.name", "data.root") in refusal(load, "", f"data.root={value}")


@pytest.mark.parametrize(
    "text",
    ['output: {name: "a\\ud800"}', 'output: {root: "\\udcff"}', '"\\udcff": 1', 'method: {name: "\\ud83d\\ude00"}'],
)
def test_half_a_character_is_refused_everywhere(load: Load, text: str) -> None:
    assert "holds half a character" in refusal(load, text)


@pytest.mark.parametrize(
    "name",
    [
        *("1e5", "12e34567", "-1e5", ".5e3", "1.0e+3", "20240101", "2024-01-01", "0x1f", "12:30", "1_000", "010"),
        *("on", "null", "=", "<<", "a: b", "#x", "- a", "ünï", "'", '"', "{", " a", "a ", "?", "&x", "*x", "!x"),
    ],
)
def test_a_name_is_read_back_from_the_resolved_config(load: Load, name: str) -> None:
    config = parse_config({"output": {"name": name}}, "test")
    assert load(dump_config(config)) == config


def test_a_lone_tilde_is_told_to_mean_null(load: Load) -> None:
    assert "~ alone means null" in refusal(load, "output: {root: ~}\n")


def test_file_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(b"\xff\xfe\x00seed")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path)


def test_missing_file_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "bias.yaml").write_text("")
    with pytest.raises(ConfigError, match=r"biass.yaml: no such config file; did you mean bias.yaml\?"):
        load_config(tmp_path / "biass.yaml")


# --- overrides ---------------------------------------------------------------------------------------------------


def test_overrides_are_dotted_and_typed_as_yaml(load: Load) -> None:
    config = load(
        "method: {name: lora}\n",
        "client.optimizer.lr=1e-4",
        "client.optimizer.nesterov=false",
        "client.clip_norm=2.5E+1",
        "data.max_train=null",
        "data.partition.alpha=.5",
        "method.targets=[qkv, fc1]",
        "backbone.model_args={depth: 3}",
        "backbone.model_args.num_heads=2",
        "output.name='12'",
        "output.root=a=b",
    )
    assert config.client.optimizer.lr == 1e-4
    assert config.client.optimizer.nesterov is False
    assert config.client.clip_norm == 25.0
    assert config.data.max_train is None
    assert config.data.partition.alpha == 0.5
    assert config.method.targets == ("qkv", "fc1")
    assert config.backbone.model_args == {"depth": 3, "num_heads": 2}
    assert (config.output.name, config.output.root) == ("12", "a=b")


def test_floats_without_a_point_are_floats_in_files_too(load: Load) -> None:
    config = load("client: {optimizer: {lr: 1e-4, weight_decay: 5E-4}}\nserver: {optimizer: {lr: 1e0}}\n")
    assert (config.client.optimizer.lr, config.client.optimizer.weight_decay) == (1e-4, 5e-4)
    assert config.server.optimizer.lr == 1.0


def test_a_later_override_wins(load: Load) -> None:
    assert load("seed: 1\n", "seed=2", "seed=3").seed == 3


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["rounds"], "'rounds' is not an override; give key=value"),
        (["=3"], "is not an override"),
        (["client..lr=3"], "is not an override"),
        (["output.name="], "output.name: no value stands after =; give one, or null for none"),
        (["data.store= "], "data.store: no value stands after ="),
        (["seed=[1"], "seed: '[1' is not a YAML value"),
        (["client=3", "client.epochs=2"], "client is already given a value"),
    ],
)
def test_overrides_that_are_none(load: Load, overrides: list[str], words: str) -> None:
    assert words in refusal(load, "", *overrides)


# --- choices -----------------------------------------------------------------------------------------------------


def test_another_choice_drops_the_fields_of_the_old_one(load: Load, tmp_path: Path) -> None:
    (tmp_path / "parent.yaml").write_text("method: {name: prompt, tokens: 20}\nseed: 7\n")
    config = load("extends: parent.yaml\nmethod: {name: lora}\n")
    assert config.method == schema.LoraConfig(name="lora")
    assert config.seed == 7


@pytest.mark.parametrize("method", ["{depth: shallow}", "{name: prompt, depth: shallow}"])
def test_the_same_choice_keeps_its_fields(load: Load, tmp_path: Path, method: str) -> None:
    (tmp_path / "parent.yaml").write_text("method: {name: prompt, tokens: 20}\n")
    config = load(f"extends: parent.yaml\nmethod: {method}\n")
    assert config.method == schema.PromptConfig(name="prompt", tokens=20, depth="shallow")


def test_nested_choices_are_replaced_alone(load: Load, tmp_path: Path) -> None:
    (tmp_path / "parent.yaml").write_text(
        "data: {name: digits, clients: 10, partition: {name: dirichlet, alpha: 0.3}}\n"
        "client: {epochs: 2, optimizer: {name: sgd, lr: 0.5}}\n"
    )
    config = load("extends: parent.yaml\n", "data.partition.name=shards", "client.optimizer.name=adamw")
    assert config.data.partition == schema.ShardsPartition(name="shards")
    assert config.client.optimizer == schema.AdamWConfig(name="adamw")
    assert (config.data.name, config.data.clients, config.client.epochs) == ("digits", 10, 2)


def test_override_to_another_choice_brings_its_own_fields(load: Load) -> None:
    config = load("method: {name: prompt, tokens: 20}\n", "method.name=adapter", "method.bottleneck=4")
    assert config.method == schema.AdapterConfig(name="adapter", bottleneck=4)


def test_backbone_and_output_names_are_no_choices(load: Load, tmp_path: Path) -> None:
    (tmp_path / "parent.yaml").write_text(
        "backbone: {name: a, pretrained: false, model_args: {depth: 2}}\noutput: {name: x, checkpoint_every: 5}\n"
    )
    config = load("extends: parent.yaml\nbackbone: {name: b}\noutput: {name: y}\n")
    assert config.backbone == schema.BackboneConfig(name="b", pretrained=False, model_args={"depth": 2})
    assert (config.output.name, config.output.checkpoint_every) == ("y", 5)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_choice_that_the_parent_left_to_the_default(load: Load, tmp_path: Path, name: str) -> None:
    """A parent that does not name the optimizer has the default's, sgd: naming it changes nothing, another does."""
    (tmp_path / "parent.yaml").write_text("client: {optimizer: {lr: 0.5}}\n")
    optimizer = load("extends: parent.yaml\n", f"client.optimizer.name={name}").client.optimizer
    assert optimizer.name == name
    assert optimizer.lr == (0.5 if name == "sgd" else schema.AdamWConfig(name="adamw").lr)


# --- unknown keys and wrong values -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "key", "hint"),
    [
        ("clinet: {epochs: 1}\n", "clinet", "did you mean client?"),
        ("client: {epoch: 1}\n", "client.epoch", "did you mean client.epochs?"),
        ("rounds: 1\n", "rounds", "did you mean federation.rounds?"),
        ("lr: 0.1\n", "lr", "did you mean client.optimizer.lr?"),
        ("method: {name: adapter, botleneck: 8}\n", "method.botleneck", "did you mean method.bottleneck?"),
        (
            "data: {name: digits, partition: {name: dirichlet, apha: 1.0}}\n",
            "data.partition.apha",
            "did you mean data.partition.alpha?",
        ),
        (
            "client: {optimizer: {name: adamw, betta1: 0.9}}\n",
            "client.optimizer.betta1",
            "did you mean client.optimizer.beta1?",
        ),
        ("server: {optimizer: {name: adam, taau: 0.1}}\n", "server.optimizer.taau", "server.optimizer.tau?"),
        ("method: {name: head, zzz: 8}\n", "method.zzz", "known here: name"),
        ("backbone: {zzz: 8}\n", "backbone.zzz", "known here: name, pretrained, checkpoint, model_args"),
    ],
)
def test_unknown_key(load: Load, text: str, key: str, hint: str) -> None:
    message = refusal(load, text)
    assert f"{key}: unknown key" in message
    assert hint in message


def test_another_choices_key_is_unknown(load: Load) -> None:
    message = refusal(load, "method: {name: lora, tokens: 10}\n")
    assert "method.tokens: unknown key" in message
    assert "rank" in message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("method: {name: lroa}\n", ["method.name", "'lroa'", "did you mean lora?", "prompt", "adapter"]),
        ("data: {name: digits, partition: {name: x}}\n", ["data.partition.name", "'x'", "dirichlet", "iid"]),
        ("client: {optimizer: {name: adam}}\n", ["client.optimizer.name", "'adam'", "sgd", "adamw"]),
        ("method: {name: prompt, depth: medium}\n", ["method.depth", "'medium'", "'shallow'", "'deep'"]),
        ("runtime: {precision: half}\n", ["runtime.precision", "'half'", "'fp16'"]),
        ("runtime: {lanes: many}\n", ["runtime.lanes", "'many'", "'auto'"]),
        ("runtime: {lanes: 0}\n", ["runtime.lanes", "0", "greater than or equal to 1"]),
        ("federation: {participation: {name: poison}}\n", ["federation.participation.name", "'poison'", "'uniform'"]),
        ("privacy: {name: dp}\n", ["privacy.name", "'dp'", "none", "sample", "user", "paper_noise"]),
        ("method: {name: lora, targets: [qkv, kv]}\n", ["method.targets.1", "'kv'", "'qkv'"]),
        ("method: {name: lora, targets: []}\n", ["method.targets"]),
        ("method: lora\n", ["method", "'lora'"]),
        ("client: null\n", ["client"]),
    ],
)
def test_wrong_choice(load: Load, text: str, words: list[str]) -> None:
    message = refusal(load, text)
    for word in words:
        assert word in message


@pytest.mark.parametrize("value", ["true", "ten", "1.5", "'10'", "1e1", "null", "[10]", "0", "-1"])
def test_counts_are_strict(load: Load, value: str) -> None:
    assert "federation.rounds" in refusal(load, f"federation: {{rounds: {value}}}\n")


@pytest.mark.parametrize(
    "text",
    [
        "client: {optimizer: {lr: 0}}\n",
        "client: {optimizer: {lr: -0.1}}\n",
        "client: {optimizer: {lr: .nan}}\n",
        "client: {optimizer: {lr: .inf}}\n",
        "client: {optimizer: {lr: '0.1'}}\n",
        "client: {optimizer: {momentum: 1.0}}\n",
        "client: {optimizer: {nesterov: 1}}\n",
        "backbone: {pretrained: 'yes'}\n",
        "data: {partition: {alpha: 1.0e+308}}\n",
        "seed: -1\n",
        "output: {name: 12}\n",
    ],
)
def test_values_are_strict(load: Load, text: str) -> None:
    leaf = text.replace("{", "").split(":")[-2].strip()
    assert leaf in refusal(load, text)


@pytest.mark.parametrize(
    ("privacy", "other", "words"),
    [
        ("name: sample, epsilon: 5, noise_multiplier: 1", "", ["epsilon: 5", "noise_multiplier: 1", "give one"]),
        ("name: sample", "", ["neither epsilon nor noise_multiplier"]),
        ("name: sample, epsilon: 5, stop_at_epsilon: 3", "", ["stop_at_epsilon: 3", "goes with noise_multiplier"]),
        ("name: sample, epsilon: 0", "", ["privacy.epsilon"]),
        ("name: sample, epsilon: 5, dp_delta: 1", "", ["privacy.dp_delta"]),
        ("name: sample, epsilon: 5, clip_norm: 1.0e+300", "", ["privacy.clip_norm"]),
        ("name: sample, epsilon: 5, max_batch: 9, accountant: rdp", "", ["max_batch: 9", "give accountant: pld"]),
        ("name: sample, epsilon: 5", "client: {clip_norm: 2.0}", ["client.clip_norm: 2.0", "privacy.clip_norm"]),
        ("name: sample, epsilon: 5", "runtime: {precision: fp16}", ["runtime.precision: fp16", "bf16"]),
        (
            "name: sample, epsilon: 5",
            "federation: {participation: {over_selection: 1.5}}",
            ["over_selection: 1.5", "privacy.name: sample", "give 1.0"],
        ),
        (
            "name: sample, epsilon: 5",
            "data: {name: synthetic, partition: {name: pool}}",
            ["data.partition.name: pool", "share their samples"],
        ),
        (
            "name: sample, epsilon: 5, secure_noise: true",
            "output: {checkpoint_every: 3}",
            ["output.checkpoint_every: 3", "privacy.secure_noise", "give 1"],
        ),
        ("name: user, epsilon: 5", "", ["federation.participation.name: uniform", "poisson", "without_replacement"]),
        (
            "name: user, epsilon: 5, sampling: without_replacement",
            "federation: {participation: {name: poisson}}",
            ["federation.participation.name: poisson", "privacy.sampling: without_replacement"],
        ),
        (
            "name: user, epsilon: 5, sampling: without_replacement, accountant: pld",
            "",
            ["accountant: pld", "without_replacement", "rdp"],
        ),
        ("name: paper_noise", "runtime: {precision: fp16}", ["runtime.precision: fp16", "paper_noise"]),
    ],
)
def test_privacy_that_cannot_be(load: Load, privacy: str, other: str, words: list[str]) -> None:
    message = refusal(load, f"privacy: {{{privacy}}}\n{other}\n")
    for word in words:
        assert word in message


def test_synthetic_clients_share_a_pool_unless_told_otherwise(load: Load) -> None:
    def partition(text: str) -> str:
        return load(f"data: {text}\n").data.partition.name

    assert load("data: {name: synthetic, clients: 1000000}\n").data.partition.name == "pool"
    assert load("data: {name: synthetic, partition: {samples: 3}}\n").data.partition.samples == 3
    assert partition("{name: synthetic, partition: {name: iid}}") == "iid"
    assert partition("{partition: {alpha: 2.0}}") == partition("{name: digits, partition: {alpha: 2.0}}") == "dirichlet"


def test_integers_are_numbers_too(load: Load) -> None:
    assert load("client: {optimizer: {lr: 1}}\n").client.optimizer.lr == 1.0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("federation: {cohort: 65}\n", ["federation.cohort: 65", "data.clients: 64", "at most 64"]),
        ("data: {clients: null}\n", ["data.clients", "natural"]),
        ("data: {partition: {name: pool}}\n", ["data.partition.name", "'pool'", "synthetic"]),
        ("federation: {evaluate_on: validation}\n", ["federation.evaluate_on", "data.validation"]),
        ("federation: {evaluate_clients: true}\n", ["federation.evaluate_clients", "data.validation"]),
        ("client: {optimizer: {momentum: 0.0}}\n", ["client.optimizer", "nesterov: false"]),
    ],
)
def test_keys_that_disagree(load: Load, text: str, words: list[str]) -> None:
    message = refusal(load, text)
    for word in words:
        assert word in message


def test_every_mistake_is_told(load: Load) -> None:
    message = refusal(load, "sead: 1\nfederation: {rounds: ten}\n")
    assert "sead: unknown key" in message
    assert "federation.rounds: 'ten'" in message


# --- what comes out ----------------------------------------------------------------------------------------------

TEXTS = [
    "",
    "method: {name: lora, rank: 4, alpha: 1e-3, targets: [qkv, fc2]}\n",
    "method: {name: prompt, depth: shallow}\nbackbone: {model_args: {depths: [1, 2], class_token: false, x: null}}\n",
    "data: {name: synthetic, partition: {name: pool, samples: 3}, clients: 1000000}\nruntime: {lanes: 8}\n",
    "data: {name: glyphs, clients: null, partition: {name: natural}, validation: 0.2}\n",
    "client: {optimizer: {name: adamw, eps: 1e-12}, schedule: {name: cosine}, steps: 3, clip_norm: 1}\n",
    "server: {optimizer: {name: yogi}}\noutput: {name: '2024-01-01'}\n",
]


@pytest.mark.parametrize("text", TEXTS)
def test_dump_loads_as_the_same_config(load: Load, text: str) -> None:
    config = load(text)
    assert load(dump_config(config)) == config


@pytest.mark.parametrize("path", ["paper/cifar100/lora.yaml", "paper/pcam/scratch.yaml", "paper/resisc45/prompt.yaml"])
def test_dump_of_a_paper_config_needs_no_parent(load: Load, path: str) -> None:
    config = load_config(CONFIGS / path)
    assert load(dump_config(config)) == config


def test_configs_are_frozen(load: Load) -> None:
    with pytest.raises(ValueError, match="frozen"):
        load("").seed = 2  # type: ignore[misc]


def test_with_values_changes_one_section(load: Load) -> None:
    config = load("seed: 7\n")
    changed = with_values(config, "output", name="x")
    assert (changed.output.name, changed.output.root, changed.seed) == ("x", "runs", 7)
    assert config.output.name is None


@pytest.mark.parametrize(
    "override",
    [
        "output.root=elsewhere",
        "output.name=x",
        "output.checkpoint_every=0",
        "runtime.compile=true",
        "runtime.cache=none",
        "federation.evaluate_every=5",
    ],
)
def test_run_name_ignores_what_cannot_change_the_result(load: Load, tmp_path: Path, override: str) -> None:
    path = tmp_path / "config.yaml"
    assert default_run_name(path, load("", override)) == default_run_name(path, load(""))


@pytest.mark.parametrize(
    "override",
    [
        "seed=2",
        "method.name=head",
        "federation.rounds=51",
        "federation.cohort=4",
        "client.optimizer.lr=0.02",
        "client.proximal=0.1",
        "data.partition.alpha=0.2",
        "data.augment=flip",
        "backbone.pretrained=false",
        "backbone.model_args.depth=3",
        "runtime.precision=bf16",
        "runtime.lanes=2",
        "runtime.threads=2",
    ],
)
def test_run_name_follows_what_can_change_the_result(load: Load, tmp_path: Path, override: str) -> None:
    path = tmp_path / "config.yaml"
    assert default_run_name(path, load("", override)) != default_run_name(path, load(""))


def test_run_name_is_readable_and_stable(load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load("seed: 3\n")
    path = tmp_path / "quick" / "bias.yaml"
    name = default_run_name(path, config)
    stem, _, digest = name.rpartition("-")
    assert stem == "quick-bias"
    assert len(digest) == 8
    assert int(digest, 16) >= 0
    monkeypatch.chdir(tmp_path)
    assert default_run_name("quick/bias.yaml", config) == name
    # A value equal to its default, or another order of keys, is the same run.
    same = load("method: {name: bias}\nfederation: {cohort: 8, rounds: 50}\nseed: 3\n")
    assert default_run_name(path, same) == name


def test_result_keys_are_flat_leaves(load: Load) -> None:
    keys = result_keys(load("method: {name: lora}\n"))
    assert keys["method.name"] == "lora"
    assert keys["method.rank"] == 8
    assert keys["method.targets"] == ["qkv"]
    assert keys["data.partition.alpha"] == 0.1
    assert not any(key.startswith("output.") for key in keys)
    assert (
        not {"runtime.compile", "runtime.cache", "federation.evaluate_every", "federation.evaluate_clients"}
        & keys.keys()
    )


def test_parse_config_names_its_source() -> None:
    with pytest.raises(ConfigError, match=r"^cell 3: seed: 'x'"):
        parse_config({"seed": "x"}, "cell 3")


def test_the_place_of_an_image_folder_is_the_data_itself() -> None:
    for name, counts in (("image_folder", True), ("cifar100", False)):
        configs = [parse_config({"data": {"name": name, "root": root}}, "test") for root in ("a", "b")]
        names = {default_run_name("config.yaml", config) for config in configs}
        assert len(names) == 1 + counts


# --- participation -----------------------------------------------------------------------------------------------


def participation(*lines: str) -> str:
    return f"federation: {{participation: {{{', '.join(lines)}}}}}\n"


LOSSES = "dropout: {name: random, after: 0.2}"


def test_another_sampling_keeps_the_rest_of_participation(load: Load) -> None:
    """Choosing another sampling loses no key about what happens to clients."""
    found = load(participation(LOSSES), "federation.participation.name=weighted").federation.participation
    assert (found.name, found.dropout.after) == ("weighted", 0.2)
    found = load(participation(LOSSES), "federation.participation.dropout={name: trace, path: losses.csv}")
    assert found.federation.participation.dropout == schema.TraceDropout(name="trace", path="losses.csv")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (participation("over_selection: 0.9"), ["over_selection: 0.9", "greater than or equal to 1"]),
        (participation("over_selection: .inf"), ["over_selection: inf", "finite"]),
        (participation("name: poisson", "over_selection: 1.5"), ["over_selection: 1.5", "poisson", "give 1.0"]),
        (participation("dropout: {name: random, before: 1.1}"), ["dropout.before: 1.1", "less than or equal to 1"]),
        (
            participation("dropout: {name: random, before: -0.1}"),
            ["dropout.before: -0.1", "greater than or equal to 0"],
        ),
        (participation("dropout: {name: random, before: 0.6, after: 0.6}"), ["dropout: before, during", "1.2", "1"]),
        (participation("dropout: {name: rand}"), ["dropout.name: 'rand'", "did you mean random?"]),
        (participation("dropout: {name: trace}"), ["dropout.path: missing"]),
        (participation("dropouts: {name: random}"), ["dropouts: unknown key", "federation.participation.dropout?"]),
        (participation("dropout: {name: random, befor: 0.1}"), ["befor: unknown", "participation.dropout.before?"]),
        (participation("availability: {name: on_off, share: 0}"), ["availability.share: 0", "greater than 0"]),
        (participation("availability: {name: on_off, share: 0.8, spread: 0.3}"), ["availability: share 0.8", "of 0.2"]),
        (participation("availability: {name: diurnal, low: 0.9, high: 0.1}"), ["availability: low: 0.9", "high: 0.1"]),
        (participation("availability: {name: diurnal, high: 2}"), ["availability.high: 2", "less than or equal to 1"]),
        (participation("devices: {name: lognormal, samples_per_second: -3}"), ["devices.samples_per_second: -3", "0"]),
        (participation("devices: {name: lognormal, compute_sigma: -1}"), ["devices.compute_sigma: -1", "0"]),
        (participation("deadline: 5.0"), ["deadline: 5.0 needs devices", "lognormal"]),
        (participation("deadline: -5.0"), ["deadline: -5.0", "greater than 0"]),
        (participation("late: partial"), ["late: partial needs a deadline"]),
        (participation("late: wait"), ["late: 'wait'", "'drop' or 'partial'"]),
    ],
)
def test_participation_that_cannot_be(load: Load, text: str, words: list[str]) -> None:
    message = refusal(load, text)
    assert "federation.participation" in message
    for word in words:
        assert word in message, message
