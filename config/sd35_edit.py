# DanceOPD (2606.27377) on SD3.5-medium: a local-edit and a global-edit teacher into one student. Its edit
# teachers are not published: make your own with config/teacher_sd35_edit_sft.py; a folder or a hub id goes
# here.
# Memory: about 24 GB at 1024 pixels, 16 GB at 512, estimated, not measured: the base in bf16 5 GB, adapters
# of rank 128 with their optimizer 2 GB, the rest activations and VAE; a source picture doubles the tokens.
model = 'stabilityai/stable-diffusion-3.5-medium'  # gated: accept its licence, then hf auth login
family = 'StableDiffusion3Pipeline'
resolution = 1024
teachers = [dict(name='local_edit', lora='your-name/sd35-local-edit-lora'),
            dict(name='global_edit', lora='your-name/sd35-global-edit-lora')]
routes = [dict(teacher='local_edit', data='local_edit'), dict(teacher='global_edit', data='global_edit')]
routes_per_step = 1                               # published, with equal weights
data = ['data/examples/local_edit.csv', 'data/examples/global_edit.csv']  # 16 drawn pairs, to try it
eval_data = []                                    # for real: thousands, from data/omniedit/prepare.py,
                                                  # which also holds some out; [] is the training rows
init_from = 'your-name/sd35-local-edit-lora'      # published best, on Z-Image: 5.75 from the local teacher,
rank = 128                                        # 4.19 from the mean of both, 2.70 from the global one
alpha = 128.0                                     # from here to lr as published
steps = 16
method = 'danceopd'
queries = 1
query = 'low_noise'
betas = [0.9, 0.999]                              # torch's own; of betas and warm-up papers say nothing
lr = 2e-4
lr_schedule = 'constant'                          # from here our choice, where nothing is said
max_steps = 3000                                  # published
batch_size = 32                                   # published: 4 accumulated, here times 8 GPUs; on one 4
micro_batch = 1
grad_checkpointing = True
ema_decay = 0.99
eval_every, save_every = 300, 50
eval_samples = 8
sample_steps = 28
score = ''
out_dir = 'out/sd35_edit'
