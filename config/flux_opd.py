# FLUX.1-dev: teachers that were trained by reward into one student. DanceOPD's recipe; on this
# model nobody has published one. The embedded guidance is the same for all. A LoRA of your own is
# one more teacher and one more route.
# Memory, computed, not measured: 54 GB at 1024 pixels (base in bf16 24 GB, adapters of rank 128
# and the optimizer 11 GB, the rest activations; before training the text encoders, 10 GB, are
# there).
_make = 'python train_teacher.py config/teacher_flux_dancegrpo.py'
model = 'black-forest-labs/FLUX.1-dev'      # gated, not commercial: accept, then hf auth login
family = 'FluxPipeline'
resolution = 1024
distilled_guidance = 3.5                    # the model card's
teachers = [dict(name='base'),
            dict(name='pickscore', lora='out/flux_pickscore', make=_make),
            dict(name='clip', lora='out/flux_clip',
                 make=_make + ' --reward="[dict(reward=\'clip\')]" --watch_reward=pickscore '
                              '--out_dir=out/flux_clip')]
routes = [dict(teacher='base', data='t2i'), dict(teacher='pickscore', data='aesthetic'),
          dict(teacher='clip', data='geneval')]
routes_per_step = 1                         # DanceOPD's; on the shapes 'sample' learned more
data = ['data/examples/t2i.txt', 'data/examples/aesthetic.txt', 'data/examples/geneval.txt']
eval_data = []                              # examples to try it; a run wants thousands

init_from = 'merge'                         # ours
rank = 128                                  # from here to lr DanceOPD's
alpha = 128.0
steps, drop_last = 16, 0
method = 'danceopd'
query = 'low_noise'
betas = [0.9, 0.999]                        # ours: torch's
lr = 2e-4
lr_schedule = 'constant'                    # ours, as all below
max_steps = 2000
batch_size, micro_batch = 32, 1
grad_checkpointing = True
ema_decay = 0.99
eval_every, eval_samples, sample_steps = 100, 8, 28  # the model card says up to 50
score = ''
out_dir = 'out/flux_opd'
