"""The sections of a config as frozen pydantic models. Each knob states its default, its unit and what it means.

Types are strict (a string is no number), but a whole float such as 1e4 is an integer: people write steps that way.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from . import rules
from .errors import ConfigError

VOCAB_MULTIPLE = 128
"""Embedding and head rows are padded to this multiple: tensor cores and every tp up to 128 divide it."""


def knob(default: Any = ..., unit: str = "", description: str = "", **constraints: Any) -> Any:
    """A field that explains itself: `unit` and `description` feed `--help` and the reference page."""
    return Field(default, description=description, json_schema_extra={"unit": unit}, **constraints)


def _whole(value: object) -> object:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _listed(value: object) -> object:
    """TOML arrays become tuples; one bare item stands for a list of one."""
    if isinstance(value, list | tuple):
        return tuple(value)
    return (value,) if isinstance(value, str | dict | BaseModel) else value


def _schedule(name: str) -> str:
    """A schedule that there is, or what can be the name of a file."""
    if name in rules.CHUNKS or "/" in name or "." in name:
        return name
    names = [f"'{known}'" for known in rules.CHUNKS]
    raise PydanticCustomError(
        "literal_error", "{expected}", {"expected": f"{', '.join(names)} or a file such as schedules/mine.txt"}
    )


Size = Annotated[int, BeforeValidator(_whole), Field(ge=1, lt=2**31)]
Count = Annotated[int, BeforeValidator(_whole), Field(ge=0, lt=2**63)]
Seed = Annotated[int, BeforeValidator(_whole), Field(ge=0, lt=2**32)]  # NumPy's RandomState takes 32 bits
Real = Annotated[float, Field(allow_inf_nan=False)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, populate_by_name=True, protected_namespaces=())


class RopeScaling(Section):
    """Stretching of rotary positions beyond the context of pretraining."""

    type: Literal["linear", "llama3"] = knob(
        description="linear: positions divided by factor; llama3: only low frequencies are (Llama 3.1, HF rope_type)"
    )
    factor: Real = knob(unit="times", description="how much longer the context becomes", ge=1)
    low_freq_factor: Real = knob(
        1.0, "turns", "llama3: wavelengths above original_context / this are divided by factor", gt=0
    )
    high_freq_factor: Real = knob(
        4.0, "turns", "llama3: wavelengths below original_context / this stay; between, blended", gt=0
    )
    original_context: Count = knob(0, "tokens", "llama3: context of pretraining, needed there")


FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "gpt2": {
        "norm": "layernorm",
        "norm_eps": 1e-5,
        "activation": "gelu",
        "positions": "learned",
        "bias": True,
        "tied": True,
    },
    "llama": {
        "norm": "rmsnorm",
        "norm_eps": 1e-5,
        "activation": "swiglu",
        "positions": "rope",
        "bias": False,
        "tied": False,
    },
}


class Model(Section):
    """The transformer. `family` sets the defaults of the knobs below it; each can be overridden."""

    family: Literal["gpt2", "llama"] = knob(description="sets the defaults of norm ... tied")
    layers: Size = knob(unit="blocks", description="depth")
    hidden: Size = knob(unit="features", description="width of the residual stream")
    heads: Size = knob(unit="heads", description="query heads")
    context: Size = knob(unit="tokens", description="most positions a sequence may have")
    vocab: Count = knob(0, "tokens", "vocabulary; 0 = that of the data's tokenizer")
    kv_heads: Count = knob(0, "heads", "key and value heads (GQA); 0 = heads")
    head_dim: Count = knob(0, "features", "width of a head; 0 = hidden / heads")
    ffn: Count = knob(0, "features", "width of the feed-forward layer; 0 = 4 * hidden (gpt2), needed for llama")
    norm: Literal["layernorm", "rmsnorm"] = knob("layernorm", description="normalisation before each sub-layer")
    norm_eps: Real = knob(1e-5, description="added to the variance under the root", gt=0)
    activation: Literal["gelu", "swiglu", "geglu"] = knob("gelu", description="feed-forward non-linearity")
    positions: Literal["learned", "rope"] = knob("learned", description="learned table or rotary")
    rope_theta: Real = knob(10000.0, description="base of the rotary wavelengths", gt=1)
    rope_scaling: RopeScaling | None = knob(None, description="see model.rope_scaling.*; none = off")
    bias: bool = knob(True, description="biases in norms and linear layers")
    tied: bool = knob(True, description="output head shares the embedding")
    qk_norm: bool = knob(False, description="RMS-normalise each head's q and k before positions (Qwen3)")
    init_std: Real = knob(
        0.02, description="of normal initialisation; outputs into the residual / sqrt(2 layers)", gt=0
    )

    @model_validator(mode="before")
    @classmethod
    def _derive(cls, given: Any) -> Any:
        """Fill what `family` and the sizes imply, so that a Model holds no open question. Bad types pass untouched."""
        if not isinstance(given, dict):
            return given
        family = given.get("family")
        values = {**(FAMILIES.get(family, {}) if isinstance(family, str) else {}), **given}
        hidden, heads = _whole(values.get("hidden")), _whole(values.get("heads"))
        if isinstance(heads, int) and values.get("kv_heads", 0) == 0:
            values["kv_heads"] = heads
        if isinstance(hidden, int) and isinstance(heads, int) and values.get("head_dim", 0) == 0:
            values["head_dim"] = hidden // heads if heads > 0 and hidden % heads == 0 else 0
        if isinstance(hidden, int) and family == "gpt2" and values.get("ffn", 0) == 0:
            values["ffn"] = 4 * hidden
        return values

    @property
    def vocab_padded(self) -> int:
        """Rows of embedding and head: vocab rounded up to a multiple of 128."""
        return -(-self.vocab // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    @property
    def gated(self) -> bool:
        """Whether the feed-forward layer has a gate, and hence three matrices instead of two."""
        return self.activation != "gelu"


class Layout(Section):
    """How the ranks are cut: world = pp * dp * cp * tp, tp varying fastest."""

    tp: Size = knob(1, "ranks", "tensor parallelism: each matrix cut over this many")
    pp: Size = knob(1, "ranks", "pipeline parallelism: layers cut into stages")
    vpp: Size = knob(1, "chunks", "pipeline chunks a rank (virtual stages)")
    cp: Size = knob(1, "ranks", "context parallelism; 1 alone: no attention here reads keys of another rank")
    dp: Count = knob(0, "ranks", "data parallelism; 0 = world / (tp * pp * cp)")
    schedule: Annotated[str, AfterValidator(_schedule)] = knob(
        "1f1b",
        "name or path",
        f"order of micro-batches in the pipeline: {', '.join(rules.CHUNKS)}, or a schedule's file, whose name has a . "
        f"or /; unless given, with vpp > 1 it is interleaved",
    )
    group: Count = knob(
        0, "micro-batches", "interleaved: that pass a chunk before the next chunk's turn; 0 = fewest, mostly pp"
    )
    stages: Annotated[tuple[Size, ...], BeforeValidator(_listed)] = knob(
        (), "layers", "of each of the pp * vpp stages, in model order; empty = equally many"
    )
    balance: bool = knob(False, description="choose stages so that ranks have equal work, with embedding and head")
    sequence_parallel: bool = knob(True, description="with tp > 1, cut norms and dropouts over the sequence too")
    overlap_products: bool = knob(
        False, description="sequence_parallel: gather and scatter piece by piece, beside the products of the pieces"
    )
    bucket: Count = knob(
        0,
        "elements",
        "gradients that are summed over the replicas together, at least; 0 = the profile's, or 25 million",
    )
    comm_profile: str = knob(
        "", "path", "communication settings that `megapre tune comm` measured; auto = the user's own; empty = none"
    )
    shard_optimizer: bool = knob(True, description="each replica keeps and updates a share of the states (ZeRO-1)")
    recompute: Annotated[tuple[Literal["norm", "activation", "block"], ...], BeforeValidator(_listed)] = knob(
        (), description="what the backward computes again instead of keeping it; block = all within a layer"
    )
    recompute_layers: Count = knob(0, "layers", "with block: of each chunk so many, from its first; 0 = all")
    recompute_group: Size = knob(1, "layers", "with block: so many in a row keep one input together")

    @model_validator(mode="before")
    @classmethod
    def _interleave(cls, given: Any) -> Any:
        """Several chunks a rank without a word on their order are interleaved."""
        if isinstance(given, dict) and "schedule" not in given:
            vpp = _whole(given.get("vpp"))
            return {**given, "schedule": "interleaved"} if isinstance(vpp, int) and vpp > 1 else given
        return given

    @property
    def model_parallel(self) -> int:
        """Ranks that hold one replica of the model."""
        return self.tp * self.pp * self.cp


class Batch(Section):
    """How many tokens a step sees."""

    micro: Size = knob(1, "sequences", "in one micro-batch on one rank")
    global_: Size = knob(unit="sequences", description="in one step, over all ranks", alias="global")
    seq_length: Size = knob(unit="tokens", description="in a sequence")

    @property
    def micro_tokens(self) -> int:
        """Tokens of one micro-batch on one rank."""
        return self.micro * self.seq_length

    @property
    def tokens(self) -> int:
        """Tokens of one step."""
        return self.global_ * self.seq_length

    def micro_batches(self, dp: int) -> int:
        """Micro-batches a rank runs in one step. Raises ConfigError where the batch cannot be cut so."""
        if problem := rules.batch_division(self.micro, self.global_, dp):
            raise ConfigError([problem], "batch")
        return self.global_ // (self.micro * dp)


class Optim(Section):
    """AdamW and its learning rate."""

    lr: Real = knob(description="peak learning rate", gt=0)
    min_lr: Real = knob(0.0, description="learning rate that the decay ends at", ge=0)
    schedule: Literal["cosine", "wsd", "linear", "constant"] = knob("cosine", description="shape after warm-up")
    warmup_steps: Count = knob(0, "steps", "linear rise from 0 to lr")
    decay_steps: Count = knob(0, "steps", "length of the decay; 0 = rest of the run; wsd: the final decay, needed")
    beta1: Real = knob(0.9, description="decay of the first moment", ge=0, lt=1)
    beta2: Real = knob(0.95, description="decay of the second moment", ge=0, lt=1)
    eps: Real = knob(1e-8, description="added to the root of the second moment", gt=0)
    weight_decay: Real = knob(0.1, description="decoupled, on matrices only", ge=0)
    clip: Real = knob(1.0, description="largest global gradient norm; 0 = off", ge=0)
    master: Literal["fp32", "none"] = knob(
        "fp32", description="master weights beside bf16 ones; none = the bf16 weights alone, rounded at random"
    )
    moments: Literal["fp32", "bf16"] = knob(
        "fp32", description="both moments; bf16 (rounded at random) needs master none"
    )
    grad_dtype: Literal["fp32", "bf16"] = knob(
        "fp32", description="of the sums of gradients over micro-batches; bf16 needs run.dtype bf16"
    )
    loss_scale: Real = knob(0.0, description="fp16: factor of the loss in the backward; 0 = dynamic, from 65536", ge=0)
    loss_scale_window: Size = knob(2000, "steps", "fp16: good steps in a row after which a dynamic scale doubles")


class Source(Section):
    """One dataset of a blend. In TOML a plain string is a source without weight."""

    prefix: str = knob(description="path of PREFIX.bin and PREFIX.idx, without the ending", min_length=1)
    weight: Real | None = knob(
        None, description="share in the blend, any scale; none on all = every sample once an epoch", gt=0
    )

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, given: Any) -> Any:
        return {"prefix": given} if isinstance(given, str) else given


Sources = Annotated[tuple[Source, ...], BeforeValidator(_listed)]


class Stage(Section):
    """A blend that holds until so many tokens were consumed."""

    until_tokens: Count = knob(0, "tokens", "consumed tokens at which the next stage begins; 0 = end (last only)")
    train: Sources = knob(description="the blend of this stage")


class Data(Section):
    """What is read, and in which proportions."""

    train: Sources = knob((), description="prefixes, or {prefix, weight} tables")
    valid: Sources = knob((), description="validation sources; empty = the split's share of train")
    stages: Annotated[tuple[Stage, ...], BeforeValidator(_listed)] = knob(
        (), description="{until_tokens, train} tables in order, instead of train"
    )
    split: str = knob("969,30,1", "weights", "documents for train, valid and test")
    tokenizer: str = knob("", "path", "tokenizer.json or .model; empty = that of the data's sidecar")
    seed: Annotated[int, BeforeValidator(_whole), Field(ge=-1, lt=2**32)] = knob(
        -1, description="of the sample order; -1 = run.seed"
    )
    document_mask: bool = knob(False, description="no attention across documents")
    reset_positions: bool = knob(False, description="positions start anew with each document")
    mask_eos_loss: bool = knob(False, description="no loss for predicting from an end-of-document token")
    prefetch: Count = knob(2, "batches", "global batches prepared ahead; 0 = none, no thread")
    index_cache: str = knob("", "path", "folder for sample indices; empty = beside the data")


class Checkpoint(Section):
    """When to save, and how many to keep. The end of a run is always saved."""

    every: Count = knob(0, "steps", "between checkpoints; 0 = at the end only")
    keep: Count = knob(0, "checkpoints", "newest to keep; 0 = all")


Axis = Literal["kv", "tp", "cp", "dp", "dp_cp", "pp", "embedding", "send"]  # parallel.comm.AXES


class Comm(Section):
    """How ranks talk, by axis of the mesh; `send` is the channels of a pipeline."""

    timeout: Annotated[Real, Field(gt=0)] = knob(
        600.0, "seconds", "until an operation that waits for another rank is an error"
    )
    timeouts: Mapping[Axis, Annotated[Real, Field(gt=0)]] = knob({}, "axis = seconds", "where it is another one")
    high_priority: Annotated[tuple[Axis, ...], BeforeValidator(_listed)] = knob(
        (), "axes", "whose kernels run before those of other streams; CUDA"
    )
    nccl: Mapping[Axis, Mapping[str, Size]] = knob(
        {}, "axis = {option = n}", "fields of ncclConfig_t, as in comm.nccl.dp.max_ctas=8; CUDA"
    )


class Run(Section):
    """Where, how long and on what."""

    steps: Size = knob(unit="steps", description="optimizer steps of the whole run")
    dir: str = knob("runs", "path", "run folders lie in here, as DIR/NAME", min_length=1)
    seed: Seed = knob(1234, description="of initialisation and, unless data.seed is set, of the data order")
    device: Literal["auto", "cpu", "cuda"] = knob("auto", description="auto = cuda where there is one")
    dtype: Literal["bf16", "fp16", "fp32"] = knob(
        "bf16", description="of weights and activations; fp16 scales the loss (optim.loss_scale)"
    )
    eval_every: Count = knob(0, "steps", "between validations; 0 = never")
    eval_batches: Size = knob(8, "batches", "global batches of one validation")
    log_every: Size = knob(1, "steps", "between printed step lines; metrics.jsonl has every step")
    threads: Count = knob(0, "threads", "of torch on the CPU; 0 = one for each physical core, within the CPU quota")
    keep_memory: bool = knob(True, description="keep memory that tensors free for the next ones (glibc)")
    deterministic: bool = knob(False, description="only kernels that repeat bit for bit, even if slower")
    compile: bool = knob(False, description="torch.compile the model")
    cuda_graph: bool = knob(False, description="record a step once and replay it; CUDA, one rank")
    tensorboard: bool = knob(True, description="write TensorBoard events into the run folder")
    trace: Annotated[tuple[Size, ...], BeforeValidator(_listed)] = knob(
        (), "steps", "whose actions are timed on every rank and drawn into traces/"
    )


GPT2_VOCAB = 50257
"""Stands in for a vocabulary that a recipe leaves to data that are not there, where only sizes matter."""


class Config(Section):
    """One run, whole. Raises `ValueError` (through pydantic) with all problems unless every rule holds."""

    name: str = knob("run", description="of the run and its folder", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    model: Model
    layout: Layout = Layout()
    batch: Batch
    optim: Optim
    data: Data = Data()
    checkpoint: Checkpoint = Checkpoint()
    comm: Comm = Comm()
    run: Run
    kernels: Mapping[str, str] = knob({}, "op = name", "implementation of an op instead of the preferred one")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.data.seed < 0:  # the one knob whose default is another section's value
            object.__setattr__(self, "data", self.data.model_copy(update={"seed": self.run.seed}))
        if problems := rules.problems({name: getattr(self, name) for name in type(self).model_fields}):
            raise ConfigError(problems)
        return self

    def with_vocab(self, vocab: int) -> "Config":
        """The same run with the vocabulary found in the data. Raises ConfigError where a rule then breaks."""
        model = self.model.model_copy(update={"vocab": vocab})
        sections = {name: getattr(self, name) for name in type(self).model_fields} | {"model": model}
        if problems := rules.problems(sections):
            raise ConfigError(problems, f"vocabulary of {vocab}")
        return self.model_copy(update={"model": model})
