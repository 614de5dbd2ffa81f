# FLUX.1-Kontext: two edit LoRAs of your own into one student that edits both ways. DanceOPD's recipe.
# Memory: about 56 GB at 1024 pixels, 44 GB at 512 (estimated: base in bf16 24 GB, adapters of rank 64 and
# optimizer 6 GB, the rest activations; the source's tokens come on top of the picture's).
model = 'black-forest-labs/FLUX.1-Kontext-dev'    # gated: accept its licence, then hf auth login
family = 'FluxKontextPipeline'
resolution = 1024
max_sequence_length = 512
distilled_guidance = 2.5                          # the model card's
teachers = [dict(name='local_edit', lora='your-name/kontext-local-edit-lora'),
            dict(name='global_edit', lora='your-name/kontext-global-edit-lora')]
routes = [dict(teacher='local_edit', data='local_edit'), dict(teacher='global_edit', data='global_edit')]
routes_per_step = 1
data = ['data/examples/local_edit.csv', 'data/examples/global_edit.csv']  # 16 drawn pairs, to try it
eval_data = []                                    # for real: thousands (data/omniedit/prepare.py)

init_from = 'merge'                               # ours: here the base can edit, and so can the mean
rank = 64
alpha = 64.0                                      # ours
steps = 16                                        # from here to lr DanceOPD's
method = 'danceopd'
query = 'low_noise'
betas = [0.9, 0.999]                              # torch's own; of betas and warm-up papers say nothing
lr = 2e-4
lr_schedule = 'constant'
max_steps = 2000
eval_every = 100
batch_size = 32
micro_batch = 1
grad_checkpointing = True
ema_decay = 0.99
eval_samples = 8
sample_steps = 28
score = ''
out_dir = 'out/kontext_edit'
