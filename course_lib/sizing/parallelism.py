"""What GPUs that share a model say to each other, in events, bytes and seconds.

Tensor parallel splits every layer and synchronises in every layer, so it wants NVLink. Pipeline
parallel gives each GPU some layers and sends activations only at the boundaries, but its stages
wait for one another: bubbles. The count of events is a first look; bytes and links decide.
"""

from dataclasses import dataclass

from course_lib.sizing.catalog import ModelShape
from course_lib.validation import number, whole_number

#: A Megatron-style layer adds up partial results after attention and after the feed-forward
#: (Shoeybi et al., Megatron-LM, 2019).
ALL_REDUCES_PER_LAYER = 2


@dataclass(frozen=True)
class CommunicationEvents:
    """How often GPUs wait for each other over some decode steps."""

    tensor_parallel_sync_events: int
    pipeline_boundary_transfers: int


@dataclass(frozen=True)
class Communication:
    """What one step sends: `bytes_per_gpu` is what each GPU puts on its link."""

    events: int
    bytes_per_gpu: float
    seconds: float  # by bandwidth alone, without the latency of each event


def communication_events(
    layers: int, pipeline_stages: int, decode_steps: int, syncs_per_layer: int = 1
) -> CommunicationEvents:
    """Count synchronisations of tensor parallel and transfers of pipeline parallel.

    One synchronisation a layer is for a first screening; a real tensor-parallel layer does two
    all-reduces (`ALL_REDUCES_PER_LAYER`).

    Raises:
        ValueError: a count is not a whole number of at least 1, or there are more stages than
            layers.
    """
    layers = whole_number("layers", layers)
    stages = whole_number("pipeline_stages", pipeline_stages, at_most=layers)
    steps = whole_number("decode_steps", decode_steps)
    syncs = whole_number("syncs_per_layer", syncs_per_layer)
    return CommunicationEvents(layers * syncs * steps, (stages - 1) * steps)


def ring_all_reduce_bytes(message_bytes: float, gpus: int) -> float:
    """Bytes that each GPU sends to add up a message over a ring: 2 (n-1)/n x message.

    A reduce-scatter and an all-gather of n-1 steps each, every step 1/n of the message (Patarasuk
    and Yuan, 2009).
    """
    gpus = whole_number("gpus", gpus)
    return 2 * (gpus - 1) / gpus * number("message_bytes", message_bytes, at_least=0)


def tensor_parallel_communication(
    model: ModelShape, tokens: int, gpus: int, link_gb_s: float, activation_bytes: float = 2
) -> Communication:
    """The all-reduces of one step over `tokens` tokens; each message is `[tokens, hidden_size]`.

    Raises:
        ValueError: a size is not a positive number.
    """
    message = whole_number("tokens", tokens) * model.hidden_size
    message_bytes = message * number("activation_bytes", activation_bytes, above=0)
    events = ALL_REDUCES_PER_LAYER * model.num_layers if whole_number("gpus", gpus) > 1 else 0
    sent = events * ring_all_reduce_bytes(message_bytes, gpus)
    return Communication(events, sent, sent / (number("link_gb_s", link_gb_s, above=0) * 1e9))


def pipeline_communication(
    model: ModelShape, tokens: int, stages: int, link_gb_s: float, activation_bytes: float = 2
) -> Communication:
    """The transfers of one step from stage to stage; each is `[tokens, hidden_size]`.

    `bytes_per_gpu` is what a GPU with a successor sends; `seconds` adds up all transfers, which
    the tokens pass one after the other.

    Raises:
        ValueError: a size is not a positive number, or there are more stages than layers.
    """
    stages = whole_number("stages", stages, at_most=model.num_layers)
    message = whole_number("tokens", tokens) * model.hidden_size
    message_bytes = message * number("activation_bytes", activation_bytes, above=0)
    seconds = (stages - 1) * message_bytes / (number("link_gb_s", link_gb_s, above=0) * 1e9)
    return Communication(stages - 1, message_bytes if stages > 1 else 0.0, seconds)


def pipeline_bubble_share(stages: int, microbatches: int) -> float:
    """The share of time in which a stage waits: (p-1) / (m+p-1) of p stages, m microbatches.

    Source: GPipe (Huang et al., 2019). In decode a microbatch's next token needs its last one, so
    fewer microbatches than stages leave stages idle at every step.

    Raises:
        ValueError: a count is not a whole number of at least 1.
    """
    stages, microbatches = (
        whole_number("stages", stages),
        whole_number("microbatches", microbatches),
    )
    return (stages - 1) / (microbatches + stages - 1)


def smallest_tensor_parallel_size(model: ModelShape, at_least: int) -> int | None:
    """The fewest GPUs, `at_least` or more, among which the heads can be divided evenly.

    Query heads must divide; KV heads must divide or be copied evenly (as vLLM requires). None
    where no number does: such a need takes pipeline stages as well.
    """
    for size in range(whole_number("at_least", at_least), model.num_heads + 1):
        kv_fits = model.num_kv_heads % size == 0 or size % model.num_kv_heads == 0
        if model.num_heads % size == 0 and kv_fits:
            return size
    return None
