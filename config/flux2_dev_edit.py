# FLUX.2-dev: flux2_klein_edit.py on the large model, whose guidance is embedded: a local-edit and a
# global-edit teacher into one student. Teachers are your own; the commands that make them are in
# `make`. Its processor needs `pip install torchvision`.
# Memory: about 56 GB at 1024 pixels, 48 GB while words are encoded (computed, not measured: base of
# 32 billion numbers in 8 bits 33 GB or Mistral in bf16 48 GB, adapters of rank 32 with their
# optimizer 4 GB, the rest activations and VAE).
import os
_make = ('python train_teacher.py config/teacher_flux2_klein_edit_sft.py {} '
         '--model=black-forest-labs/FLUX.2-dev --family=Flux2Pipeline --base_storage=float8 '
         '--distilled_guidance=1.0 --prompt_dropout=0.0 --rank=32 --alpha=32.0 --micro_batch=1 '
         '--out_dir=out/flux2_{}_edit')
model = 'black-forest-labs/FLUX.2-dev'            # gated, not commercial
family = 'Flux2Pipeline'
resolution = 1024
distilled_guidance = 4.0                          # the pipeline's; data is not guided: learned at 1
base_storage = 'float8'                           # in bf16 the base alone is 64 GB
teachers = [dict(name='local_edit', lora='out/flux2_local_edit', make=_make.format('', 'local')),
            dict(name='global_edit', lora='out/flux2_global_edit',
                 make=_make.format('config/teacher_global_edit.py', 'global'))]
routes = [dict(teacher=_k, data=_k) for _k in ('local_edit', 'global_edit')]
routes_per_step = 1                               # published, with equal weights
_folder = 'data/omniedit' if os.path.isfile('data/omniedit/local_edit.csv') else 'data/examples'
data = [f'{_folder}/local_edit.csv', f'{_folder}/global_edit.csv']
eval_data = [_p.replace('.csv', '_val.csv') for _p in data if 'omniedit' in _p]

init_from = 'merge'                               # ours: the base can edit, and so can the mean;
                                                  # on Z-Image local was best, 5.75 to 4.19
rank, alpha = 32, 32.0
steps, drop_last = 16, 0                          # from here to max_steps DanceOPD's
method, query = 'danceopd', 'low_noise'
betas = [0.9, 0.999]                              # torch's own; of betas papers say nothing
lr, lr_schedule = 2e-4, 'constant'
max_steps, batch_size, micro_batch = 3000, 32, 1  # 4 accumulated on 8 GPUs
grad_checkpointing = True
ema_decay = 0.99                                  # ours, as what follows
eval_every, save_every, eval_samples, sample_steps, score = 300, 50, 8, 28, ''
out_dir = 'out/flux2_edit'
