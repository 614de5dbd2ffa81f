# SD3.5-medium learns to edit and keeps what it could: the frozen base answers for text-to-image prompts, an
# edit LoRA for edit instructions. DanceOPD's settings; the edit teacher is your own
# (config/teacher_sd35_edit_sft.py).
# Memory: about 24 GB at 1024 pixels, 16 GB at 512 (estimated as in sd35_edit.py).
model = 'stabilityai/stable-diffusion-3.5-medium'
family = 'StableDiffusion3Pipeline'
resolution = 1024
teachers = [dict(name='base'), dict(name='edit', lora='your-name/sd35-edit-lora')]
routes = [dict(teacher='base', data='t2i', weight=2.0), dict(teacher='edit', data='local_edit'),
          dict(teacher='edit', data='global_edit')]  # as many text-to-image steps as edit steps
routes_per_step = 1
data = ['data/examples/t2i.txt', 'data/examples/local_edit.csv', 'data/examples/global_edit.csv']
eval_data = []                                    # examples to try it; a run wants thousands, some held out

init_from = 'your-name/sd35-edit-lora'            # published, on Z-Image: the T2I start is the worst, 1.89
rank = 128                                        # from here to lr as published
alpha = 128.0
steps = 16
method = 'danceopd'
query = 'low_noise'
betas = [0.9, 0.999]                              # torch's own; of betas and warm-up papers say nothing
lr = 2e-4
lr_schedule = 'constant'
max_steps = 3000                                  # published
batch_size = 32                                   # 4 accumulated on 8 GPUs; on one 4
micro_batch = 1
grad_checkpointing = True
ema_decay = 0.99                                  # our choice
eval_every, save_every = 300, 50
eval_samples = 8
sample_steps = 28
score = ''
out_dir = 'out/sd35_t2i_edit'
