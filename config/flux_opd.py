# FLUX.1-dev: several LoRA specialists into one student, with an anchor. DanceOPD's recipe; on this model
# nobody has published one, so the numbers that depend on it are our choice. The embedded guidance is the
# same for all.
# Memory: about 48 GB at 1024 pixels (estimated: base in bf16 24 GB, adapters of rank 64 and optimizer 6 GB,
# the rest activations; the text encoders, 10 GB, visit the GPU before training).
model = 'black-forest-labs/FLUX.1-dev'            # gated: accept its licence, then hf auth login
family = 'FluxPipeline'
resolution = 1024
max_sequence_length = 512                         # the pipeline's
distilled_guidance = 3.5                          # the model card's
teachers = [dict(name='base'), dict(name='photo', lora='your-name/flux-photo-lora'),
            dict(name='lettering', lora='your-name/flux-lettering-lora')]
routes = [dict(teacher='base', data='t2i'), dict(teacher='photo', data='aesthetic'),
          dict(teacher='lettering', data='ocr')]
routes_per_step = 1
data = ['data/examples/t2i.txt', 'data/examples/aesthetic.txt', 'data/examples/ocr.txt']
eval_data = []                                    # examples to try it; a run wants thousands, some held out

init_from = 'merge'
rank = 64
alpha = 64.0
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
sample_steps = 28                                 # the model card says up to 50
score = ''
out_dir = 'out/flux_opd'
