# An evening on one card of 24 GB: flux2_klein_edit.py at 512 pixels, with short rollouts. The same
# two teachers, which the same card makes with --resolution=512:
#     python train_teacher.py config/teacher_flux2_klein_edit_sft.py --resolution=512
# (with config/teacher_global_edit.py before the --resolution for the second).
# Memory: about 12 GB, 9 GB while words are encoded (computed, not measured: base in bf16 7.8 GB or
# Qwen3 8 GB, adapters of rank 64 with their optimizer 2.2 GB, activations of 2560 tokens 1.5 GB).
# Time: 500 steps of 8 samples are 34,000 forwards of 22 TFLOP, teachers included and a backward as
# three: 2.9 hours at 80 TFLOP/s, with checkpointing's forwards again (computed).
import os
_make = 'python train_teacher.py config/teacher_flux2_klein_edit_sft.py --resolution=512'
model = 'black-forest-labs/FLUX.2-klein-base-4B'  # Apache 2.0
family = 'Flux2KleinPipeline'
resolution = 512
teachers = [dict(name='local_edit', lora='out/klein_local_edit', guidance=4.0, make=_make),
            dict(name='global_edit', lora='out/klein_global_edit', guidance=4.0,
                 make=_make.replace('.py --', '.py config/teacher_global_edit.py --'))]
routes = [dict(teacher=_k, data=_k) for _k in ('local_edit', 'global_edit')]
routes_per_step = 'sample'                        # from here on all is ours
_folder = 'data/omniedit' if os.path.isfile('data/omniedit/local_edit.csv') else 'data/examples'
data = [f'{_folder}/local_edit.csv', f'{_folder}/global_edit.csv']
eval_data = [_p.replace('.csv', '_val.csv') for _p in data if 'omniedit' in _p]

init_from = 'merge'
rank = 64
alpha = 64.0
rollout_guidance = student_guidance = 1.0         # guidance is learned, forwards are half
steps, drop_last = 8, 0
method = 'danceopd'
query = 'stratified'
lr = 2e-4
max_steps = 500
batch_size = 8
micro_batch = 1
grad_checkpointing = True
ema_decay = 0.98
eval_every, save_every = 100, 50
eval_samples, score = 8, ''
sample_steps = 16
out_dir = 'out/klein_24gb'
