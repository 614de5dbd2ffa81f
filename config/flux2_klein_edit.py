# FLUX.2-klein, the undistilled 4B: a local-edit and a global-edit teacher into one student that
# edits both ways and needs no guidance. DanceOPD's recipe; on this model nobody has published one.
# Teachers are your own, config/teacher_flux2_klein_edit_sft.py makes each. The 9B is the same with
# --model=black-forest-labs/FLUX.2-klein-base-9B, there as here (another licence: not commercial).
# Memory: about 15 GB at 1024 pixels, 9 GB while words are encoded (computed, not measured: base in
# bf16 7.8 GB or Qwen3 8 GB, adapters of rank 64 with their optimizer 2.2 GB, activations 4 GB for
# 8704 tokens: the picture's, its source's and 512 of text). The 9B: 28 GB and 17 GB.
import os
_make = 'python train_teacher.py config/teacher_flux2_klein_edit_sft.py'
model = 'black-forest-labs/FLUX.2-klein-base-4B'  # Apache 2.0
family = 'Flux2KleinPipeline'
resolution = 1024
teachers = [dict(name='local_edit', lora='out/klein_local_edit', guidance=4.0, make=_make),
            dict(name='global_edit', lora='out/klein_global_edit', guidance=4.0,
                 make=f'{_make} config/teacher_global_edit.py')]
routes = [dict(teacher=_k, data=_k) for _k in ('local_edit', 'global_edit')]
routes_per_step = 1                               # published, with equal weights
_folder = 'data/omniedit' if os.path.isfile('data/omniedit/local_edit.csv') else 'data/examples'
data = [f'{_folder}/local_edit.csv', f'{_folder}/global_edit.csv']
eval_data = [_p.replace('.csv', '_val.csv') for _p in data if 'omniedit' in _p]

init_from = 'merge'                               # ours: the base can edit, and so can the mean;
                                                  # on Z-Image local was best, 5.75 to 4.19
rank, alpha = 64, 64.0
rollout_guidance = student_guidance = 1.0         # ours: guidance is learned, forwards are half
steps, drop_last = 16, 0                          # from here to max_steps DanceOPD's
method = 'danceopd'
query = 'low_noise'
betas = [0.9, 0.999]                              # torch's own; of betas papers say nothing
lr = 2e-4
lr_schedule = 'constant'
max_steps = 3000
batch_size = 32                                   # 4 accumulated on 8 GPUs
micro_batch = 1
grad_checkpointing = True
ema_decay = 0.99                                  # ours, as what follows
eval_every, save_every = 300, 50
eval_samples, score = 8, ''
sample_steps = 28
out_dir = 'out/klein_edit'
