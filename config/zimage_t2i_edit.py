# DanceOPD's second experiment on Z-Image: two buckets, text-to-image with the frozen base as its teacher,
# and edits with one edit LoRA of your own. Editing takes the Omni model, as in zimage_edit.py.
# Memory: about 40 GB at 1024 pixels (estimated as there).
model = 'Tongyi-MAI/Z-Image-Omni-Base'            # the name it was announced under; or the folder you have
family = 'ZImageOmniPipeline'
resolution = 1024
max_sequence_length = 512
teachers = [dict(name='base'), dict(name='edit', lora='your-name/zimage-edit-lora')]
routes = [dict(teacher='base', data='t2i', weight=2.0), dict(teacher='edit', data='local_edit'),
          dict(teacher='edit', data='global_edit')]  # as many text-to-image steps as edit steps
routes_per_step = 1
data = ['data/examples/t2i.txt', 'data/examples/local_edit.csv', 'data/examples/global_edit.csv']
eval_data = []                                    # examples to try it; a run wants thousands, some held out

init_from = 'your-name/zimage-edit-lora'          # ours: the paper does not state the start of this run
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
out_dir = 'out/zimage_t2i_edit'
