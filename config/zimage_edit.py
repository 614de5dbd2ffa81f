# DanceOPD's main experiment, two edit teachers into one student, on Z-Image. Through diffusers it is the
# Omni model that takes a source picture; teachers are your own (config/teacher_sd35_edit_sft.py with this
# model and family).
# Memory: about 40 GB at 1024 pixels (estimated: base in bf16 12 GB, adapters of rank 128 with their
# optimizer 10 GB, the rest activations, VAE and the SigLIP encoder). rank = 32 saves 7 GB.
model = 'Tongyi-MAI/Z-Image-Omni-Base'            # the name it was announced under; or the folder you have
family = 'ZImageOmniPipeline'
resolution = 1024
max_sequence_length = 512                         # the pipeline's
teachers = [dict(name='local_edit', lora='your-name/zimage-local-edit-lora'),
            dict(name='global_edit', lora='your-name/zimage-global-edit-lora')]
routes = [dict(teacher='local_edit', data='local_edit'), dict(teacher='global_edit', data='global_edit')]
routes_per_step = 1                               # published, with equal weights
data = ['data/examples/local_edit.csv', 'data/examples/global_edit.csv']  # 16 drawn pairs, to try it
eval_data = []                                    # for real: thousands (data/omniedit/prepare.py)

init_from = 'your-name/zimage-local-edit-lora'    # published, GEdit: 5.75; 4.19 merged, 2.70 the global one
lora_targets = ['to_q', 'to_k', 'to_v', 'to_out.0', 'w1', 'w2', 'w3']  # published: attention and feed-forward
rank = 128                                        # from here to max_steps as published
alpha = 128.0
steps = 16
method = 'danceopd'
query = 'low_noise'
betas = [0.9, 0.999]                              # torch's own; of betas and warm-up papers say nothing
lr = 2e-4
lr_schedule = 'constant'
max_steps = 3000
batch_size = 32                                   # 4 accumulated, here times 8 GPUs; on one 4
micro_batch = 1
grad_checkpointing = True
ema_decay = 0.99                                  # our choice
eval_every, save_every = 300, 50
eval_samples = 8
sample_steps = 28
score = ''
out_dir = 'out/zimage_edit'
