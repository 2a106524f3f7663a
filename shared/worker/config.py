"""Configuration of a prefill or decode worker."""

from typing import Literal

from pydantic import Field

from shared.config import ServiceConfig


class WorkerConfig(ServiceConfig):
    """A worker: computes prompts (prefill) or outputs (decode); both kinds have the same flags."""

    model: str = Field("SmolLM2-135M-Instruct", description="Model to serve: a known name, or a model directory.")
    served_model_name: str = Field("", description="Name that clients ask for; empty takes the model's.")
    engine: Literal["torch", "sim"] = Field("torch", description="torch computes; sim computes no model.")
    dtype: Literal["bfloat16", "float32"] = Field("bfloat16", description="Type of weights and activations.")
    kv_dtype: Literal["auto", "bfloat16", "float32", "fp8"] = Field(
        "auto",
        description="Form of KV in pages; auto takes dtype's. All workers of a cluster need the same.",
    )
    num_threads: int = Field(0, ge=0, description="Threads that compute; 0 takes all cores.")
    device: str = Field(
        "auto",
        pattern="^(auto|cpu|cuda(:[0-9]+)?)$",
        description="cpu, cuda or cuda:N; auto takes a GPU if any. Ranks take consecutive ones, from this on.",
    )
    kernels: str = Field("auto", description="cuda, native, torch or w4a4; auto takes the first that can serve.")
    attention: str = Field(
        "auto",
        pattern="^(auto|fa2|fa3)$",
        description="FlashInfer's kernels for prompts of dense models on a GPU; fa3 is for Hopper, somewhat faster and "
        "takes minutes to compile once, where fa2 takes half of one. auto: FlashInfer's choice.",
    )
    page_size: int = Field(16, ge=1, le=1024, description="Tokens per KV page.")
    kv_cache_mb: int = Field(1024, ge=1, description="Memory for KV pages, in MiB, of each rank.")
    dequantized_mb: int = Field(
        0,
        ge=0,
        description="Memory, in MiB, of each rank, for copies in bfloat16 of a dense model's NVFP4 weights on a GPU: "
        "with them prompts need not dequantize these anew (all of 8B take 14,000). For prefill workers.",
    )
    num_pages: int = Field(0, ge=0, description="Number of KV pages; 0 takes as many as kv_cache_mb has room for.")
    max_model_len: int = Field(0, ge=0, description="Longest sequence; 0 takes what the model was made for.")
    max_step_tokens: int = Field(512, ge=1, description="Tokens computed in one step, at most.")
    max_num_sequences: int = Field(64, ge=1, description="Sequences that run at once, at most.")
    max_waiting: int = Field(
        2,
        ge=0,
        description="Sequences that routers send beyond those that can run; others wait in the queue.",
    )
    max_queued_tokens: int = Field(
        0, ge=0, description="Prompt tokens that routers send before earlier ones are computed; 0 takes 16 full steps."
    )
    step_timeout_ms: int = Field(
        120_000,
        ge=100,
        description="A step that takes longer than this, because a device or its driver hangs, ends the worker; its "
        "streams go on elsewhere. Kernels that the warm-up left out are compiled within steps.",
    )
    warm_up_s: float = Field(
        120.0,
        ge=0,
        description="Time for computing every kind of step once before the worker is found, so that no request waits "
        "for kernels to be compiled, and no rate is measured meanwhile; what is left then is made at first use. 0: no "
        "time.",
    )
    lease_ttl_ms: int = Field(10_000, ge=100, description="Life of a lease on KV pages unless renewed.")
    checksums: bool = Field(
        False, description="Hand pages over with checksums, which readers verify; costs both sides a pass over them."
    )
    tensor_parallel: int = Field(1, ge=1, le=64, description="Ranks (processes) that compute the model together.")
    expert_split: Literal["experts", "matrices"] = Field(
        "experts", description="What ranks share out of routed experts: whole experts, or each expert's matrices."
    )
    rank_timeout_ms: int = Field(
        30_000, ge=100, description="A rank that the others wait for longer than this ends the worker."
    )
    transport: Literal["nixl", "local"] = Field(
        "nixl",
        description="How KV pages move between workers; local moves none, for a worker alone.",
    )
    index_interval_ms: int = Field(50, ge=1, description="Time between two updates of the prefix index.")
    speculation: Literal["auto", "mtp", "ngram", "off"] = Field(
        "auto",
        description="Who proposes drafts: the model's own layer for it (mtp), the text so far (ngram), nobody (off); "
        "auto takes mtp where the model has it, else ngram. The output is the same with all of them (but see "
        "verification).",
    )
    verification: Literal["coupled", "rejection"] = Field(
        "coupled",
        description="How drafts are verified: coupled leaves every token as it would be without them. rejection "
        "accepts more of what mtp proposes at a temperature (docs/decisions/0028); there the distribution of tokens is "
        "kept, but which ones a seed gives depends on the drafts: on load, on timing, on where an output is continued "
        "after a fault. Greedy output, and what ngram proposes, are the same with both.",
    )
    num_draft_tokens: int = Field(5, ge=1, le=32, description="Drafts per sequence and step, at most.")
    adaptive_drafts: bool = Field(
        True, description="Take as many drafts as are worth their time, by what is measured; else always the most."
    )
    sim_prefill_ms_per_token: float = Field(0.2, ge=0, description="Speed of the sim engine's prefill.")
    sim_decode_ms: float = Field(10.0, ge=0, description="Time of the sim engine's decode step.")
    sim_decode_ms_per_sequence: float = Field(0.5, ge=0, description="What each sequence adds to such a step.")
    sim_draft_acceptance: float = Field(
        0.0, ge=0, le=1, description="How often a draft of the sim engine is right; 0: it proposes none."
    )
