# An edit teacher for sd35_edit.py: imitation of edit pairs, source and target side by side (a diptych).
# Once as here for local edits, once for global ones:
#     python train_teacher.py config/teacher_sd35_edit_sft.py \
#         --data="['data/omniedit/global_edit.csv']" --out_dir=out/teacher_global_edit
# Memory: about 24 GB at 1024 pixels, 16 GB at 512 (estimated: base in bf16 5 GB, adapter of rank 128 and
# its optimizer 2 GB, the rest activations and VAE).
model = 'stabilityai/stable-diffusion-3.5-medium'
family = 'StableDiffusion3Pipeline'
resolution = 1024                                 # DanceOPD's
method = 'sft'
data = ['data/examples/local_edit.csv']           # 8 drawn pairs, to try it; data/omniedit/prepare.py makes
eval_data = []                                    # thousands, and local_edit_val.csv

rank = 128                                        # DanceOPD's student has the same, so it loses nothing
alpha = 128.0
sigmas = 'logit_normal'                           # as SD3 was trained
prompt_dropout = 0.1                              # usual; guidance works afterwards
betas = [0.9, 0.999]                              # torch's own; of betas and warm-up papers say nothing
lr = 1e-4                                         # from here our choice
lr_schedule = 'constant'
max_steps = 10000
batch_size = 32
micro_batch = 2
grad_checkpointing = True
ema_decay = 0.999
eval_every, save_every = 1000, 100
eval_samples = 8
sample_steps = 28
score = ''
out_dir = 'out/teacher_local_edit'
