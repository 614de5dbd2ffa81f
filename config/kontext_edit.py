# FLUX.1-Kontext: a local-edit and a global-edit teacher into one student that edits both ways.
# DanceOPD's recipe; on this model nobody has published one.
# Memory, computed, not measured: 56 GB at 1024 pixels, 44 GB at 512 (base in bf16 24 GB, adapters
# of rank 64 and the optimizer 6 GB, the rest activations; a source's tokens come on top of the
# picture's).
import os
_make = 'python train_teacher.py config/teacher_kontext_edit_sft.py'
model = 'black-forest-labs/FLUX.1-Kontext-dev'  # gated, not commercial: accept, then hf auth login
family = 'FluxKontextPipeline'
resolution = 1024
distilled_guidance = 2.5                    # the model card's
teachers = [dict(name='local_edit', lora='out/kontext_local_edit', make=_make),
            dict(name='global_edit', lora='out/kontext_global_edit',
                 make=f'{_make} config/teacher_global_edit.py')]
routes = [dict(teacher=_k, data=_k) for _k in ('local_edit', 'global_edit')]
routes_per_step = 1                         # DanceOPD's; on the shapes 'sample' learned more
_folder = 'data/omniedit' if os.path.isfile('data/omniedit/local_edit.csv') else 'data/examples'
data = [f'{_folder}/local_edit.csv', f'{_folder}/global_edit.csv']
eval_data = [_p.replace('.csv', '_val.csv') for _p in data if 'omniedit' in _p]

init_from = 'merge'                         # ours: the base can edit, and so can the mean;
                                            # on Z-Image local was best, 5.75 to 4.19
rank = 64                                   # ours: of 128 all adapters take 5 GB more
alpha = 64.0
steps, drop_last = 16, 0                    # from here to lr DanceOPD's
method = 'danceopd'
query = 'low_noise'
betas = [0.9, 0.999]                        # ours: torch's
lr = 2e-4
lr_schedule = 'constant'                    # ours, as all below
max_steps = 2000
batch_size, micro_batch = 32, 1
grad_checkpointing = True
ema_decay = 0.99
eval_every, eval_samples, sample_steps = 100, 8, 28
score = ''
out_dir = 'out/kontext_edit'
