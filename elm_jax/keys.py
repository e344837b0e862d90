"""The keys of the configuration, by section: each with its type, default and meaning, and what a value may be."""

from dataclasses import dataclass, field
from typing import Any

from elm_jax.ecg.rasterize import LAYOUTS
from elm_jax.ecg.recording import LEADS, NORMALIZATIONS
from elm_jax.schema import key
from elm_jax.scoring.protocols import PROTOCOLS
from elm_jax.text.forms import CHAT_FORMS
from elm_jax.text.retrieved import CONTENTS


@dataclass(frozen=True)
class DataConfig:
    names: tuple[str, ...] = key((), "datasets: folders or files under data.root, dataset names, or URLs of tables")
    root: str = key(".", "folder that the datasets and their ecg_path are relative to")
    prefixes: dict[str, str] = key({}, "beginnings of ecg_path, and the folder that stands in the place of each")
    outside_root: bool = key(False, "records may name recordings outside data.root: absolute, by .. or through links")
    remote_gb: float = key(16.0, "GB of the rows of tables named by URLs that are kept on disk", limit="at least 0")
    fold: int = key(1, "which of the dataset's folds", limit="at least 1")
    val_fraction: float = key(
        0.02, "part of the training patients kept for validation, of a dataset without a split val of its own; with 0 "
        "such splits alone validate, where train.eval_every or early_stopping is set", limit="at least 0 and below 1",
    )
    representation: str = key(
        "signal", "what the model sees of an ECG", choices=("signal", "symbolic", "stacked_signal", "rgb")
    )
    segment_len: int = key(2500, "samples of an ECG after resampling", limit="from 1 to 10000000")
    sampling_rate: int = key(250, "samples per second after resampling", limit="from 1 to 100000")
    leads: tuple[str, ...] = key(
        LEADS, "leads by name, or by place in the canonical order (from 0)",
        choices=LEADS, accepts=tuple[int | str, ...],
    )  # fmt: skip
    normalize: str = key(
        "minmax", "how a signal is scaled: by range or deviation, of all leads (as minmax) or each lead; or not",
        choices=NORMALIZATIONS,
    )  # fmt: skip
    norm_eps: float = key(1e-6, "added to the range or deviation before dividing by it", limit="above 0")
    subset: float | None = key(None, "use this part of the training records", limit="above 0 and at most 1")
    weights: tuple[float, ...] | None = key(
        None, "how often an epoch sees each of data.names; 1 is every sample once", limit="above 0"
    )
    augment_ecg: bool = key(False, "random changes to training signals: noise, baseline wander")
    augment_rgb: bool = key(False, "random changes to training images: rotation, blur, colours")
    augment_paper: bool = key(False, "training images as of used paper: creases, handwriting, other inks, noise, JPEG")
    image_layout: str = key("12x1", "twelve leads on a page: rows by columns of leads", choices=tuple(LAYOUTS))
    image_rhythm: tuple[str, ...] = key((), "leads drawn once more, whole, below the others", choices=LEADS)
    images: str | None = key(
        None, "folder of images that stand for drawn ones, by the recordings' ecg_path with .png or .jpg behind it"
    )
    missing: str = key(
        "error", "a view that a record lacks, an image in data.images or the signal of an image: a bad record, an "
        "image drawn, or none in the model's input", choices=("error", "draw", "mask"),
    )  # fmt: skip
    left_out: tuple[str, ...] = key((), "views of an elm of several that no ECG is shown in")
    drop_views: float = key(
        0.0, "probability that an ECG is trained without one of its views, each as likely", limit="from 0 to 1"
    )
    swap_views: float = key(0.0, "probability that it is trained with them in reverse order", limit="from 0 to 1")
    perturb: str | None = key(None, "replace the ECG, as a control", choices=("noise", "zeros", "only_text"))
    system_prompt: str | None = key(
        None, "the system prompt: its text, the path of a text file, or a name of elm_jax.text.prompts, as think"
    )
    ecg_tokenizer: str | None = key(None, "file of the symbolic tokenizer: .json or the reference's .pkl")
    min_ecg_tokens: int = key(512, "symbolic tokens of an ECG that truncation keeps", limit="at least 0")
    explicit_thinking: bool = key(False, "answers begin with a think tag that is given, not generated")
    pack: bool = key(True, "several conversations in a row")
    share: str = key("system", "what conversations of a row compute once", choices=("none", "system", "ecg"))
    max_len: int = key(2048, "longest row, in tokens", limit="at least 1")
    max_bad_records: float = key(
        0.001, "part of the records that may be bad before the run stops", limit="at least 0 and below 1"
    )
    workers: int = key(0, "loader processes; 0 loads in the training process", limit="at least 0")
    timeout: float = key(300.0, "seconds of reading one record that end a run; 0 is never", limit="at least 0")


@dataclass(frozen=True)
class RetrievalConfig:
    """Of the view `retrieved`, which any elm has where there is an index."""

    index: str | None = key(None, "a folder of elm_jax.index: what it knows of similar ECGs is written into the prompt")
    k: int = key(1, "how many recordings", limit="at least 1")
    mode: str = key("feature", "what is compared", choices=("feature", "signal", "combined"))
    scaling: str = key(
        "z_scored", "numbers that are compared: in deviations over the index, or raw", choices=("z_scored", "raw")
    )
    content: str = key("report", "what is written of each: its report, its features or both", choices=CONTENTS)
    place: str = key("system", "where: in the system prompt, or behind the ECG", choices=("system", "question"))
    search: str = key("exact", "by whom: exactly, on the device, or by FAISS", choices=("exact", "faiss"))


@dataclass(frozen=True)
class LoraConfig:
    rank: int = key(0, "rank of the LoRA matrices; 0 is no LoRA", limit="at least 0")
    alpha: float = key(32.0, "LoRA's scale is alpha / rank", limit="above 0")
    dropout: float = key(0.0, "dropout before the LoRA matrices", limit="at least 0 and below 1")
    targets: str = key("all", "layers with LoRA: all, peft (the choice of PEFT), or names as q_proj,v_proj")
    adapter: str | None = key(None, "a PEFT adapter folder to start from")


@dataclass(frozen=True)
class LlmConfig:
    name: str = key("qwen2.5-1.5b-instruct", "registry key, Hugging Face id or local folder")
    scratch: dict[str, Any] | None = key(None, "sizes of a randomly initialised LLM, instead of weights")
    compute_dtype: str = key("bfloat16", "of activations and frozen weights", choices=("bfloat16", "float32"))
    param_dtype: str = key("float32", "of trained weights", choices=("bfloat16", "float32"))
    scan: bool = key(True, "compile one layer and scan over them")
    remat: str = key("dots", "what the backward pass recomputes", choices=("none", "full", "dots"))
    dropout: float = key(0.0, "dropout after embeddings and before each residual sum", limit="at least 0 and below 1")
    chat: str | None = key(None, "chat form; None is that of the tokenizer", choices=tuple(CHAT_FORMS))
    attention: str = key("auto", "attention kernel", choices=("auto", "xla", "cudnn"))
    lora: LoraConfig = field(default_factory=LoraConfig)


@dataclass(frozen=True)
class EncoderConfig:
    name: str | None = key(None, "the ECG encoder, for example merl")
    checkpoint: str | None = key(None, "its weights: a .safetensors or .pt file; None initialises randomly")
    tokens: int = key(1, "signal tokens of an ECG", limit="at least 1")
    cache: bool = key(False, "compute a frozen encoder's outputs once for each recording, and keep them on disk")
    config: dict[str, Any] = key({}, "sizes of the encoder, by their names in its table")


@dataclass(frozen=True)
class ConnectorConfig:
    hidden: int | None = key(None, "width inside an MLP connector; None is the LLM's", limit="at least 1")


@dataclass(frozen=True)
class MuonConfig:
    momentum: float = key(0.95, "momentum", limit="at least 0 and below 1")
    ns_steps: int = key(5, "Newton-Schulz iterations", limit="at least 1")
    adamw_lr_ratio: float = key(0.015, "learning rate of what AdamW has, by optim.lr", limit="above 0")


@dataclass(frozen=True)
class OptimConfig:
    name: str = key("adamw", "the optimizer", choices=("adam", "adamw", "muon"))
    lr: float = key(1e-4, "peak learning rate", limit="above 0")
    schedule: str = key("constant", "learning rate after warm-up", choices=("constant", "cosine", "inv_sqrt"))
    warmup_ratio: float = key(0.1, "part of the steps that warms up linearly", limit="from 0 to 1")
    warmup_steps: int | None = key(None, "steps that warm up, instead of a part of them", limit="at least 0")
    min_lr_ratio: float = key(0.1, "where cosine ends, relative to optim.lr", limit="from 0 to 1")
    weight_decay: float = key(1e-2, "decoupled for adamw, in the gradient for adam", limit="at least 0")
    weight_decay_scale: str = key(
        "none", "how weight decay follows the batch size", choices=("none", "inv_sqrt", "inv_linear")
    )
    beta1: float = key(0.9, "decay of the first moment", limit="at least 0 and below 1")
    beta2: float = key(0.99, "decay of the second moment", limit="at least 0 and below 1")
    eps: float = key(1e-8, "added to the root of the second moment", limit="above 0")
    grad_clip: float = key(0.0, "largest global gradient norm; 0 is no clipping", limit="at least 0")
    skip_spikes: float = key(
        0.0, "skip steps whose loss or gradient norm is so many standard deviations above the mean of the last 128; "
        "6 is usual, 0 skips none", limit="at least 0",
    )  # fmt: skip
    ema: float = key(
        0.0, "decay of an average of the trained weights, taken after each step; 0.999 is usual, 0 takes none",
        limit="at least 0 and below 1",
    )  # fmt: skip
    accum_steps: int = key(1, "micro-batches of a step", limit="at least 1")
    ref_batch: int | None = key(
        None, "batch size that lr and weight decay are meant for; None is this one", limit="at least 1"
    )
    muon: MuonConfig = field(default_factory=MuonConfig)


@dataclass(frozen=True)
class TrainConfig:
    batch_size: int | None = key(
        8, "rows of a step, over all hosts and micro-batches; None where train.conversations is given",
        limit="at least 1"
    )
    conversations: int | None = key(
        None, "conversations of a step, instead of rows: as many rows as they need", limit="at least 1"
    )
    epochs: int = key(1, "passes over the data", limit="at least 1")
    steps: int | None = key(None, "optimizer steps, instead of epochs", limit="at least 1")
    log_every: int = key(10, "steps between lines of metrics.jsonl", limit="at least 1")
    save_every: int = key(500, "steps between checkpoints", limit="at least 1")
    save_minutes: float | None = key(None, "minutes after which a checkpoint is due, too", limit="above 0")
    save_wait: bool = key(False, "take no step before a checkpoint is written and verified")
    eval_every: int | None = key(
        None, "steps between validation losses; None is train.save_every", limit="at least 1"
    )
    keep: int = key(2, "checkpoints kept, the best one aside", limit="at least 1")
    early_stopping: bool = key(False, "stop when the validation loss no longer falls")
    patience: int = key(5, "validations without a better loss before stopping", limit="at least 1")
    patience_delta: float = key(0.1, "how much lower counts as better", limit="at least 0")
    timeout: float = key(1800.0, "seconds without progress that end a run, with stacks; 0 is none", limit="at least 0")

    @property
    def count(self) -> int:
        """Conversations of a step where these are counted, else its rows."""
        return self.conversations or self.batch_size or 0


@dataclass(frozen=True)
class MeshConfig:
    data: int = key(-1, "replicas; -1 is what the other axes leave", limit="-1 or at least 1")
    fsdp: int = key(1, "shards of weights and optimizer state", limit="-1 or at least 1")
    tensor: int = key(1, "shards of each layer's work", limit="-1 or at least 1")


@dataclass(frozen=True)
class JudgeConfig:
    url: str | None = key(None, "http(s)://HOST/v1 of a language model that marks answers too; sends their texts there")
    model: str | None = key(None, "its name there")
    key_variable: str = key("ELM_JAX_JUDGE_KEY", "the environment variable with its key; without one none is sent")
    timeout: float = key(120.0, "seconds that a reply may take", limit="above 0")
    retries: int = key(3, "how often it is asked again where it is not reached or busy", limit="at least 0")
    workers: int = key(4, "answers that are judged at once, up to 64", limit="at least 1")
    max_tokens: int = key(4096, "longest reply, in tokens", limit="at least 1")
    limit: int | None = key(None, "judge only the first so many answers", limit="at least 1")


@dataclass(frozen=True)
class EvalConfig:
    at_end: bool = key(False, "evaluate when training has finished")
    batch_size: int = key(32, "conversations generated at once", limit="at least 1")
    max_new_tokens: int = key(128, "longest answer, in tokens", limit="at least 1")
    temperature: float = key(0.0, "0 is greedy decoding", limit="at least 0")
    top_p: float = key(1.0, "nucleus of sampling", limit="above 0 and at most 1")
    repetition_penalty: float = key(
        1.0, "logits of tokens that were there already are divided by it, negative ones multiplied", limit="above 0"
    )
    controls: tuple[str, ...] = key(
        ("zeros", "noise", "text_only", "shuffled"), "what the ECG is replaced by, to compare; with retrieval, what is "
        "retrieved too",
        choices=("zeros", "noise", "text_only", "shuffled"),
    )  # fmt: skip
    folds: tuple[int, ...] | None = key(None, "folds to average over; None is data.fold", limit="at least 1")
    seeds: tuple[int, ...] | None = key(None, "seeds to average over; None is seed", limit="at least 0")
    limit: int | None = key(None, "evaluate only the first so many questions", limit="at least 1")
    guidance: float = key(
        1.0, "of ECGs that are generated: how far they are led away from those of no condition; 1 is not at all",
        limit="at least 0",
    )  # fmt: skip
    ema: bool = key(False, "validate, evaluate, chat and export with the average of the weights (optim.ema)")
    labels: str | None = key(None, "PTB-XL's folder: also ask for each of its statements whether the ECG shows it")
    grounding: tuple[str, ...] = key(
        ("grounding",), "names of the records whose answers are held against what is measured of their ECG; all: of all"
    )
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    protocol: str = key("ours", "by which rules answers are scored", choices=tuple(PROTOCOLS))
    wordnet: str | None = key(None, "folder of NLTK's data, for METEOR's WordNet; None looks in NLTK's places")
    bert_model: str | None = key(None, "model of BERTScore, which is computed if it is named or the protocol has it")


@dataclass(frozen=True)
class LogConfig:
    progress: bool = key(True, "progress bar on a terminal")
    wandb: bool = key(False, "log to Weights & Biases too")
    wandb_project: str | None = key(None, "its project there; None is WANDB_PROJECT, else elm_jax")
    wandb_entity: str | None = key(None, "the user or team there; None is WANDB_ENTITY, else your own")
    wandb_tags: tuple[str, ...] = key((), "its tags there; none are those of WANDB_TAGS")
    tensorboard: bool = key(False, "log to TensorBoard too")
    profile_steps: str | None = key(None, "profile steps a to b, as a:b")


@dataclass(frozen=True)
class RlConfig:
    """Of the policy objectives sapo, grpo and dapo. None is the objective's own choice."""

    rewards: tuple[str, ...] = key(
        ("format", "tags", "answer"), "what an answer is judged by, summed: names, numeric(TOLERANCE), your own"
    )
    reward_weights: tuple[float, ...] | None = key(None, "of each of rl.rewards; None is 1 each")
    answers: int = key(4, "answers to each prompt", limit="at least 2")
    max_new_tokens: int = key(384, "longest of these answers, in tokens", limit="at least 1")
    temperature: float = key(0.8, "of drawing them, and of their probabilities", limit="above 0")
    top_p: float = key(0.95, "nucleus of drawing them", limit="above 0 and at most 1")
    batch_size: int = key(32, "answers drawn at once, those of one prompt at least", limit="at least 1")
    updates: int = key(2, "steps that learn from the same answers", limit="at least 1")
    advantage: str | None = key(
        None, "rewards less their group's mean, by: population or sample deviation, nothing, or that of the batch",
        choices=("population", "sample", "unscaled", "batch"),
    )
    mean: str | None = key(
        None, "over what losses are averaged: tokens, samples, their sums, these by the longest answer",
        choices=("token", "sample", "sum", "length"),
    )
    tau_pos: float = key(1.0, "of sapo: how fast it lets go of good answers", limit="above 0")
    tau_neg: float = key(1.05, "of sapo: of bad ones", limit="above 0")
    low: float = key(0.2, "of grpo, dapo: ratios below 1 - low are clipped", limit="above 0")
    high: float | None = key(None, "of grpo, dapo: ratios above 1 + high are clipped", limit="above 0")
    cap: float | None = key(None, "of grpo, dapo: the largest ratio of a bad answer", limit="above 0")
    sequence: bool = key(False, "of grpo, dapo: one ratio for an answer (GSPO)")
    kl: float = key(0.0, "weight of the divergence from the model as it was in the beginning", limit="at least 0")
    resample: int | None = key(
        None, "how often a prompt whose answers are all alike is replaced by another", limit="at least 0"
    )
    overlong: int = key(0, "tokens before rl.max_new_tokens in which a reward falls by up to 1", limit="at least 0")
    skip_truncated: bool | None = key(None, "learn nothing from answers without an end")
    show_every: int = key(50, "steps between tables of answers in W/rollouts", limit="at least 1")


@dataclass(frozen=True)
class SslConfig:
    """Of the self-supervised objectives of encoders. None is the objective's own choice."""

    mask_ratio: float = key(0.75, "part of the patches that is hidden", limit="above 0 and at most 1")
    norm_patches: bool | None = key(None, "patches are rebuilt less their mean, by their deviation")
    text: str | None = key(None, "what ECGs are held against: a Hugging Face folder or id of a text tower")
    frozen_layers: int | None = key(
        None, "first layers of it that are not trained, nor its embeddings then; -1: nothing of it is",
        limit="-1 or at least 0",
    )  # fmt: skip
    probe: str | None = key(
        None, "labelled recordings that the encoder is judged by at validations: a task of elm_jax.probe, as "
        "ptbxl_super=FOLDER, table=FILE or demo"
    )  # fmt: skip
    temperature: float = key(0.07, "of merl: what cosines are divided by", limit="above 0")


@dataclass(frozen=True)
class DpoConfig:
    """Of the preference objective dpo."""

    loss: str = key(
        "sigmoid", "how a pair is judged", choices=("sigmoid", "sigmoid_norm", "robust", "hinge", "ipo", "simpo")
    )
    beta: float = key(0.1, "how sharply", limit="above 0")
    label_smoothing: float = key(
        0.0, "part of the pairs that may be the wrong way round", limit="at least 0 and below 1"
    )
    gamma: float = key(0.5, "the margin that simpo asks for", limit="at least 0")
    reference: bool = key(True, "compare with the model as it was in the beginning (simpo never does)")
    rpo_alpha: float = key(0.0, "weight of the chosen answer's own loss, by token, beside that", limit="at least 0")
