"""Limits on what an input can ask for, in one place; docs/limits.md says the same to users. No torch.

Whatever is small on the disk is read in seconds and in a few hundred megabytes, or refused. Each limit is far above
what models and data have.
"""

# Checkpoints
MAX_HEADER_BYTES = 8 << 20  # of a safetensors file: some 60,000 tensors, where a model has hundreds
MAX_DIMENSIONS = 64  # of a tensor, as in torch
MAX_SIDE_FILE_BYTES = 64 << 20  # of a tokenizer, a template, a licence
MAX_CONFIG_BYTES = 256 << 10  # of config.json and the other files of settings, each of which transformers copies often
MAX_TOKENIZER_CONFIG_BYTES = 4 << 20
MAX_REPORT_BYTES = 512 << 20  # of an evaluation's results, which dpn has written: some 2,000,000 of them
MAX_EXTRA_TOKENS = 10_000  # that tokenizer_config.json adds to those of the vocabulary
MAX_TOKEN_CHARACTERS = 10_000  # of a token that is added to a vocabulary
MAX_JSON_DEPTH = 100  # objects and lists in one another; what reads them by recursion may go some times deeper
MAX_LABELS = 10_000  # of a config's num_labels, for each of which transformers makes an entry
MAX_RESIZED = 2  # the shorter side of a resized image, in sides of the vision tower's
MAX_TILES = 64  # of one image
MAX_PADDING = 100_000  # of a prompt in tokens, where tokenizer.json has it
MAX_CARD_BYTES = 64 << 10  # of a model card's head

# Chat templates, for a handful of short conversations together
TEMPLATE_SECONDS = 1  # of CPU time
TEMPLATE_BYTES = 300_000_000
MAX_PROMPT_CHARACTERS = 1_000_000

# tokenizer.json, to load it and to encode a handful of short texts
TOKENIZER_SECONDS = 1  # of CPU time
TOKENIZER_BYTES_A_SECOND = 4 << 20  # of the file, for each of which it has one more second
TOKENIZER_BYTES = 500_000_000

# Recipes
MAX_YAML_BYTES = 64 << 10
MAX_YAML_VALUES = 10_000  # with every alias written out

MAX_SAMPLES = 10_000_000  # to draw; the demo has no end
MAX_BATCH = 4096  # samples that `dpn bench` measures together
MAX_ROUNDS = 10_000  # of `dpn bench`
MAX_SEED = 2**63 - 1

# Rows of data
MAX_ROW_CHARACTERS = 1_000_000
MAX_ROW_TURNS = 256  # each is rendered with all before it
MAX_ROW_IMAGES = 256

# Images
MAX_PIXELS = 89_478_485  # from here on Pillow warns of a decompression bomb
MAX_WHOLE_PIXELS = 24_000_000  # of a sample's images together; where they have more, the largest are halved
MIN_HALVED_PIXELS = 1_000_000  # smaller images are never halved: half their sides may be less than a vision tower takes
MAX_DECODER_BYTES = 500_000_000  # where a decoder takes more than the decoded pixels
MAX_IMAGE_BYTES = 1 << 30
MAX_ASPECT_RATIO = 200  # the shorter side is scaled to the vision tower's: a thinner image grows without bounds
