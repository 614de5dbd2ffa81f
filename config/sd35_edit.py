# DanceOPD (2606.27377) on SD3.5-medium: a local-edit and a global-edit teacher into one student.
# Its teachers are not published; two commands make your own, and then this file runs as it stands:
#     python data/omniedit/prepare.py --limit=2000    or nothing: then it is 16 drawn pairs
#     python train_teacher.py config/teacher_sd35_edit_sft.py
#     python train_teacher.py config/teacher_sd35_edit_sft.py config/teacher_global_edit.py
#     torchrun train_opd.py config/sd35_edit.py
# Memory, computed, not measured: 24 GB at 1024 pixels, 16 GB at 512 (the base in bf16 5 GB,
# adapters of rank 128 and the optimizer 2 GB, the rest activations and VAE; a source doubles the
# tokens).
import os
_make = 'python train_teacher.py config/teacher_sd35_edit_sft.py'
model = 'stabilityai/stable-diffusion-3.5-medium'  # gated: accept its licence, then hf auth login
family = 'StableDiffusion3Pipeline'
resolution = 1024                           # DanceOPD's, down to max_steps, but for what is ours
teachers = [dict(name='local_edit', lora='out/sd35_local_edit', make=_make),
            dict(name='global_edit', lora='out/sd35_global_edit',
                 make=f'{_make} config/teacher_global_edit.py')]
routes = [dict(teacher=_k, data=_k) for _k in ('local_edit', 'global_edit')]
routes_per_step = 1
_folder = 'data/omniedit' if os.path.isfile('data/omniedit/local_edit.csv') else 'data/examples'
data = [f'{_folder}/local_edit.csv', f'{_folder}/global_edit.csv']
eval_data = [_p.replace('.csv', '_val.csv') for _p in data if 'omniedit' in _p]

init_from = 'out/sd35_local_edit'           # best of four starts, though on Z-Image: 5.75; the
rank = 128                                  # mean of both 4.19, global 2.70, T2I 1.89
alpha = 128.0
steps, drop_last = 16, 0
method = 'danceopd'
query = 'low_noise'
betas = [0.9, 0.999]                        # ours: torch's; warm-up and average are ours too
lr = 2e-4
lr_schedule = 'constant'                    # ours: nothing is said
max_steps = 3000
batch_size = 32                             # published: 4 accumulated; ours: on 8 GPUs
micro_batch = 1                             # ours, as all below
grad_checkpointing = True
ema_decay = 0.99
eval_every, save_every, eval_samples, sample_steps = 300, 50, 8, 28
score = ''
out_dir = 'out/sd35_edit'
