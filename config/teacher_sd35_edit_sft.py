# An edit teacher for sd35_edit.py: imitation of edit pairs, source and target side by side (a
# diptych). Once as here for local edits, once for global ones, or one teacher for both:
#     python train_teacher.py config/teacher_sd35_edit_sft.py
#     python train_teacher.py config/teacher_sd35_edit_sft.py config/teacher_global_edit.py
#     python train_teacher.py config/teacher_sd35_edit_sft.py config/teacher_both_edits.py
# DanceOPD's edit teachers are imitations too, but how they were trained is not said: the numbers
# are ours. Memory, computed, not measured: 24 GB at 1024 pixels, 16 GB at 512 (base in bf16 5 GB,
# adapter of rank 128 and its optimizer 2 GB, the rest activations and VAE).
import os
model = 'stabilityai/stable-diffusion-3.5-medium'  # gated: accept its licence, then hf auth login
family = 'StableDiffusion3Pipeline'
resolution = 1024                           # the student's
method = 'sft'                              # 8 drawn pairs, to try it, until there are more
_folder = 'data/omniedit' if os.path.isfile('data/omniedit/local_edit.csv') else 'data/examples'
data = [f'{_folder}/local_edit.csv']
eval_data = [_p.replace('.csv', '_val.csv') for _p in data if 'omniedit' in _p]

rank = 128                                  # the student's: a start from here loses nothing
alpha = 128.0
sigmas = 'logit_normal'                     # as SD3 was trained
prompt_dropout = 0.1                        # usual; guidance works afterwards
betas = [0.9, 0.999]
lr = 1e-4
lr_schedule = 'constant'
max_steps = 10000
batch_size = 32
micro_batch = 2
grad_checkpointing = True
ema_decay = 0.999
eval_every, save_every, eval_samples, sample_steps = 1000, 100, 8, 28
score = ''
out_dir = 'out/sd35_local_edit'
