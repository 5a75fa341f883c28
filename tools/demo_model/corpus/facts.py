"""The demo model's facts about stagemesh, itself and good manners: questions with one answer each."""

from __future__ import annotations

from .words import listed

DEFINITIONS: dict[str, str] = {
    "a stage": "A stage is a contiguous range of decoder layers. The first stage also embeds; the last one also holds "
    "the norm, the head and the sampler.",
    "a worker": "A worker is one deployed stage service: one tensor-parallel group, one gRPC port.",
    "a standby": "A standby is a registered worker that holds no stage, or a warm copy of one.",
    "an assignment": "An assignment is the coordinator's order to a worker to hold a range of layers.",
    "a link": "A link is one directed stream of activations between two workers, carried by UCX or TCP.",
    "a pipeline": "A pipeline is a chain of workers that covers all layers once.",
    "an epoch": "An epoch is a pipeline's fencing number. It rises with every change, and an older one is refused.",
    "a generation": "A generation is a fresh number for one assignment or one link, made each time.",
    "a pool": "A pool is the set of workers that may hold one stage.",
    "a step": "A step is one micro-batch passing through the pipeline. A plan says its rows.",
    "a row": "A row is a part of one step: a prefill chunk or one decode token of a sequence.",
    "a page": "A page is a fixed number of token positions of the KV cache.",
    "the boundary journal": "The boundary journal keeps the activations that a worker sent on, so that a lost "
    "neighbour can be refilled.",
    "the token log": "The token log is the gateway's record of the tokens that a client was promised.",
    "the gateway": "The gateway speaks HTTP and gRPC with clients, schedules the steps and hands out pages.",
    "the coordinator": "The coordinator decides which worker holds which layers.",
    "the control plane": "The control plane is gRPC between the coordinator, the workers and the gateways.",
    "the schedule plane": "The schedule plane carries plans out to the workers and results back to the gateway.",
    "the activation plane": "The activation plane carries tensors from worker to worker, by UCX or TCP.",
    "stagemesh": "Stagemesh serves one large language model split over many machines. Every stage is a service of "
    "its own.",
    "pipeline parallelism": "Pipeline parallelism gives each machine a range of layers of the model.",
    "tensor parallelism": "Tensor parallelism splits each layer over several ranks.",
    "prefill": "Prefill reads the prompt, in chunks, and fills the KV cache.",
    "decode": "Decode makes one new token for each sequence in a step.",
    "continuous batching": "Continuous batching lets requests join and leave the batch at every step.",
    "preemption": "Preemption takes the pages of one request for a while when pages run out.",
    "the KV cache": "The KV cache holds the keys and values of the tokens so far, in pages.",
    "a credit": "A credit is the right to send one more activation over a link.",
    "a lease": "A lease is the time for which a worker counts as alive. It is renewed all the time.",
    "UCX": "UCX is a library that moves data over shared memory, TCP or a fast network.",
}

DEFINITION_FORMS = (
    "What is {x}?",
    "What is {x} in stagemesh?",
    "Tell me what {x} is.",
    "Explain {x}.",
    "Define {x}.",
    "Can you explain {x}?",
    "Explain to me what {x} is.",
    "What does stagemesh mean by {x}?",
    "Do you know what {x} is?",
    "Describe {x}.",
)

ABOUT = (
    "Stagemesh serves one large language model split over many machines. A client sends a prompt to the gateway. The "
    "gateway makes a plan and sends it to every worker. The first stage embeds the tokens and runs its layers. It "
    "sends the activations over a link to the next stage. The last stage samples a token and sends it back to the "
    "gateway. When a worker is lost, the coordinator raises the epoch and puts another worker in its place."
)
STORY = (
    "Once upon a time a little token lived in a prompt. One day the gateway called it. The token went to the first "
    "stage and became a vector. It crossed a link, and another, and another. At the last stage the sampler looked at "
    "it and smiled. Out came a new token, and the two were friends. The end."
)

# Entries: all forms of a question, and the answer.
QUESTIONS: list[tuple[tuple[str, ...], str]] = [
    (("Tell me about stagemesh.", "How does stagemesh work?", "Explain how stagemesh works."), ABOUT),
    (("Tell me a story.", "Tell a story.", "Write a story.", "Can you tell me a story?"), STORY),
    (
        ("How do I start stagemesh?", "How is stagemesh started?", "How can I run stagemesh?"),
        "Run stagemesh serve with the name of a model.",
    ),
    (
        ("What happens when a worker dies?", "What if a worker is lost?", "What happens if a worker goes down?"),
        "The coordinator raises the epoch and another worker takes its place.",
    ),
    (
        ("Who schedules the steps?", "Who makes the plans?", "Which service makes the plans?"),
        "The gateway makes the plans.",
    ),
    (
        ("Who samples the tokens?", "Where are tokens sampled?", "Which stage samples?"),
        "The last stage samples the tokens.",
    ),
    (("Who embeds the tokens?", "Which stage embeds the tokens?"), "The first stage embeds the tokens."),
    (
        ("Who decides the layers?", "Who gives layers to the workers?", "Which service places the layers?"),
        "The coordinator gives layers to the workers.",
    ),
    (
        ("Does the gateway touch tensors?", "Do tensors pass through the gateway?"),
        "No. The gateway never touches a tensor.",
    ),
    (
        ("How many steps are in flight?", "How many steps are in flight at once?"),
        "With P stages, up to P plus one steps are in flight.",
    ),
    (
        ("Which planes are there?", "What are the three planes?", "Name the planes of stagemesh."),
        "There are three planes: control, schedule and activations.",
    ),
    (
        ("Which services are there?", "What are the services of stagemesh?", "Name the services of stagemesh."),
        "The coordinator, the gateway and one worker for each stage.",
    ),
    (
        ("Who are you?", "What are you?", "What is your name?", "Introduce yourself."),
        "I am the small model that ships with stagemesh.",
    ),
    (
        ("What can you do?", "What do you know?", "How can you help me?", "What can I ask you?", "Help."),
        "I can add, subtract and multiply small numbers, count, sort, and explain stagemesh.",
    ),
    (
        ("How large are you?", "How big are you?", "How many layers do you have?"),
        "I have eight layers. I am very small.",
    ),
    (("Hello!", "Hello", "Hello there!", "Hi!", "Hi", "Hi there", "Hey!", "Hey"), "Hello! How can I help you?"),
    (("Good morning!", "Good morning"), "Good morning! How can I help you?"),
    (("Good evening!", "Good evening"), "Good evening! How can I help you?"),
    (("How are you?", "How are you doing?", "How do you do?"), "I am fine, thank you."),
    (("Thank you!", "Thanks!", "Thanks", "Thank you very much.", "Many thanks."), "You are welcome."),
    (("Goodbye!", "Bye!", "Bye", "Good night!", "See you."), "Goodbye!"),
]

UNKNOWN_ANSWER = "I do not know that. I know small sums, counting, sorting and stagemesh."
TOO_LARGE_ANSWER = "That is too large for me. I know numbers up to ninety-nine."

UNKNOWN_FORMS = (
    "What is the capital of {x}?",
    "Who was {x}?",
    "Write a poem about {x}.",
    "Why is {x} so {y}?",
    "How do I cook {x}?",
    "Where is {x}?",
    "When did {x} begin?",
    "Who wrote {x}?",
    "Translate {x} into {y}.",
    "What do you think of {x}?",
    "Tell me about {x} and {y}.",
    "What is the weather in {x}?",
    "{x} {y}",
    "{x}",
    "Write a program that finds {x}.",
    "Summarise {x} for me.",
)
UNKNOWN_WORDS = listed(
    "France Paris Berlin Japan London Caesar Einstein Shakespeare Hamlet the_moon the_sun water music pasta soup "
    "bread blue old German French Python Java history football tennis winter summer the_sea rain physics chemistry "
    "love money a_car a_train a_bridge London Rome Egypt Mozart Picasso gold silver iron the_sky rice tea coffee "
    "prime_numbers"
)

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a helpful assistant that answers briefly.",
    "You are the demo model of stagemesh.",
    "Answer in one sentence.",
    "Answer shortly.",
    "Be brief.",
    "Be polite and precise.",
    "You are a friendly teacher of arithmetic.",
    "You are a calculator.",
    "You answer questions about stagemesh.",
    "You are an assistant. Answer the user's question.",
    "You are a helpful, respectful and honest assistant.",
    "Follow the user's instructions carefully.",
)

SORT_WORDS = listed(
    "apple banana cherry grape lemon mango orange peach pear plum bear bird cat cow dog duck fish fox goat horse lion "
    "mouse owl pig rabbit sheep tiger wolf zebra blue green red white yellow book chair door house lamp table tree "
    "window river stone"
)
