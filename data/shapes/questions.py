"""
What data/shapes/papers.py asks: arms, each the settings in which a run differs from COMMON, and
questions, each a few arms and what the paper says of them. Nothing runs here.

In settings {out} is the study's folder and {seed} the run's seed.
"""
from collections import namedtuple

from prepare import LAYERS

SKILLS = dict(t2i='base', count='count', local_edit='local_edit', global_edit='global_edit')
WEIGHTS = dict(t2i=0.5, count=0.5, local_edit=2.0, global_edit=2.0)    # the common ones
EVEN = dict.fromkeys(SKILLS, 1.0)
# what is scored: bucket: (rows, whose skill it is or '', the function of world.py)
SCORED = {k: (f'{k}_val', v, 'score') for k, v in SKILLS.items()} | dict(
    unseen=('t2i_pairs', '', 'score'), open=('open_val', '', 'score'),
    blue=('taste_val', '', 'blue_share'))
TAUGHT = (*SKILLS, 'unseen')            # of these every run is scored, if its arm says nothing else
PLAIN_WORDS = 't2i', 'open', 'unseen'                          # and of these, on the half-made base
WORDS = *PLAIN_WORDS, 'blue'
TUNED = 4e-3, 8e-3, 16e-3               # rates that are tried where an arm wants its own
LOW = 1e-3, 3e-3, 8e-3
LOSSES = 1e-3, 3e-3, 8e-3, 16e-3
SEEDS = 3

Arm = namedtuple('Arm', 'settings rates cost script scored needs spent')
Question = namedtuple('Question', 'asks claim arms contrasts note')
Contrast = namedtuple('Contrast', 'says better worse over')


def arm(rates=(), cost=1, script='train_opd', scored=TAUGHT, needs=(), spent=0, **settings):
    """`cost` in the demonstration's; `script` 'look' scores a start, untrained; `needs`
    are runs that come before; `spent` forwards of them are counted as its own."""
    return Arm(settings, rates, cost, script, scored, needs, spent)


def routes(samples=None, weights=WEIGHTS, only=SKILLS):
    more = {k: dict(samples=samples[k]) if samples else {} for k in only}
    return [dict(teacher=SKILLS[k], data=k, weight=weights[k], **more[k]) for k in only]


def split(t2i, count, local_edit, global_edit, **more):
    """A batch of so many samples of each route; no samples is no route."""
    counts = dict(t2i=t2i, count=count, local_edit=local_edit, global_edit=global_edit)
    return dict(batch_size=sum(counts.values()),
                routes=routes(counts, only=[k for k in counts if counts[k]], **more))


def demonstration(*samples, **settings):
    weights = dict(t2i=0.5, count=1.5, local_edit=1.0, global_edit=2.0)
    return arm(init_from=TEACHER + 'local_edit', **settings, **SKIP,
               **split(*samples, weights=weights))


def policy(reward, **settings):
    """Flow-OPD's policy gradient."""
    return dict(method='flowopd', eta=0.7, reward=reward, **TEN, **settings)


def merged(count, local_edit, global_edit):
    """The teachers' mean by these weights."""
    weights = dict(t2i=1.0, count=count, local_edit=local_edit, global_edit=global_edit)
    return arm(script='look', init_from='merge', rank=64, routes=routes(weights=weights),
               routes_per_step='sample')


def taught(only):
    return [dict(name=k, **({} if k == 'base' else dict(lora=f'data/shapes/teachers/{k}')))
            for k in dict.fromkeys(SKILLS[k] for k in only)]


TEACHER = 'data/shapes/teachers/'
# the recipe that arms differ from, and the first that was tried: the demonstration is what the
# study made of it
ROLLOUT = dict(steps=4, drop_last=0)
COMMON = dict(init_from='merge', **ROLLOUT, **split(2, 2, 15, 15))
# SD3's last step begins at a noise of .009 and decides nothing. As many states without that one;
SKIP = dict(steps=5, drop_last=1)
SIXTEEN = dict(steps=17, drop_last=1)   # DanceOPD's sixteen;
TEN = dict(steps=10, drop_last=1)       # and DiffusionOPD's and Flow-OPD's ten, as released. An SDE
FEW = split(1, 1, 7, 8)                 # of four steps would be far from the noise that it is at
EDITS = 'local_edit', 'global_edit'
FROM_BASE = dict(init_from='base', lora_targets=LAYERS)        # the teachers' layers, as all have
# of all four routes, also where not all are trained
SAME_START = dict(init_from='{out}/ours/{seed}/start', needs=('ours/{seed}',))
# what the question of the start led to: begin as the teacher whose skill a student of the merge is
# worst at, and give samples to what that one cannot do
FOUND = dict(init_from=TEACHER + 'local_edit', **split(
    2, 6, 6, 20, weights=dict(t2i=0.5, count=1.0, local_edit=1.0, global_edit=2.5)))
GROUPS = dict(group_size=4, **split(4, 4, 12, 12))
ODE = dict(method='diffusionopd', **TEN, **FEW)
SDE = dict(eta=0.7, **ODE)
ALONE = dict(max_steps=250, **SAME_START)                             # as ours: 250 updates
ON_EDITS = dict(routes_per_step='sample', routes=routes(only=EDITS), teachers=taught(EDITS))
OWN = [f'{{out}}/make-own/0/{k}.csv' for k in SKILLS]                 # the teachers' own pictures
DRAWN = 19200                           # forwards that these cost, once
IMITATE = dict(script='train_teacher', method='sft', data=OWN[:2] + OWN[2:] * 4, eval_data=[],
               init_from='{out}/ours/{seed}/start', rank=32, alpha=32.0, batch_size=34,
               micro_batch=30, lr=8e-3, needs=('make-own/0', 'ours/{seed}'))
HALF = dict(model='{out}/make-half/0/base', resolution=24, needs=('make-half/0',), scored=WORDS)
GUIDED = dict(HALF, init_from='base', script='look', scored=PLAIN_WORDS)
LOOK = dict(script='look', rank=64)
START = dict(script='look', init_from='merge', routes=routes(), routes_per_step='sample',
             scored=(*TAUGHT, 'open'))
GRPO = 'config/teacher_shapes_grpo.py'
CLEAR, BLUE = (dict(reward=f'data/shapes/world.py:{k}') for k in ('clear', 'blue'))
WORD_DATA = ['data/shapes/t2i.csv', 'data/shapes/open.csv']
PAIR = [dict(teacher='clear_shapes', data='t2i', samples=17),
        dict(teacher='blue', data='open', samples=17)]
RL = dict(script='train_teacher', config=GRPO, lora_targets=LAYERS, lr_schedule='cosine',
          eval_data=[], **HALF)
BOTH = dict(RL, data=WORD_DATA, reward=[CLEAR, BLUE], rank=32, alpha=64.0)

# what has to be there before some runs
MAKES = {
    'make-own': None,                                          # pictures; papers.py draws them
    'make-half': None,                                         # a base stopped early
    'make-clear': arm(**RL, data=WORD_DATA[:1], reward=[CLEAR], max_steps=150, cost=3.5),
    'make-blue': arm(**RL, data=WORD_DATA[1:], reward=[CLEAR, BLUE], max_steps=150,
                     cost=3.5)}

ARMS = {
    'ours': arm(scored=(*TAUGHT, 'open')),
    # losses
    'k2': arm(queries=2, **SKIP, **FEW), 'k4': arm(queries=4, **SKIP, **FEW),
    'plain': arm(rates=LOSSES, queries=9, **TEN, **FEW),
    'ode': arm(rates=LOSSES, **ODE), 'sde': arm(rates=LOSSES, **SDE),
    'sde-code': arm(kl_var='code', lr=3e-3, **SDE),
    'flow-k1': arm(rates=(3e-4, *LOSSES), **policy('k1', **FEW)),
    'flow-group': arm(rates=(3e-4, 1e-3, 3e-3), **policy('k1_group', **GROUPS)),
    'flow-paper': arm(lr=3e-4, **policy('paper', **GROUPS)),
    'flow-code': arm(rates=LOW, **policy('code', **FEW)),
    'base-ours': arm(rates=TUNED, **FROM_BASE),
    'base-ode': arm(rates=TUNED, **FROM_BASE, **ODE),
    'base-sde': arm(rates=TUNED, **FROM_BASE, **SDE),
    'base-flow-k1': arm(rates=(3e-4, 1e-3), **FROM_BASE, **policy('k1', **FEW)),
    'base-flow-group': arm(rates=(3e-4, 1e-3), **FROM_BASE, **policy('k1_group', **GROUPS)),
    'base-flow-code': arm(rates=LOW, **FROM_BASE, **policy('code', **FEW)),
    # starts
    'from-count': arm(init_from=TEACHER + 'count'),
    'from-local': arm(init_from=TEACHER + 'local_edit'),
    'from-global': arm(init_from=TEACHER + 'global_edit'),
    'from-student': arm(init_from='{out}/ours/{other}/latest', needs=('ours/{other}',)),
    # published recipes, at twice the demonstration's cost: their loss, rollout, routing and start;
    # and what the study led to, at once its cost
    'ours-twice': arm(cost=2),
    'found': arm(**FOUND), 'found-skip': arm(**SKIP, **FOUND),
    'demonstration': demonstration(2, 8, 6, 18),
    'demonstration-8': demonstration(1, 2, 1, 4, lr=4e-3),
    'dance': arm(cost=2, rates=LOW, steps=16, query='low_noise', routes_per_step=1,
                 routes=routes(weights=EVEN), init_from=TEACHER + 'local_edit'),
    'diffusion': arm(cost=2, rates=TUNED, method='diffusionopd', steps=10, drop_last=1,
                     **FROM_BASE, **split(9, 9, 9, 9, weights=EVEN)),
    'flow': arm(cost=2, rates=LOW, method='flowopd', steps=10, drop_last=1, eta=0.7, reward='code',
                kl_var='code', group_size=4, updates=2, anchor='base', anchor_beta=0.04,
                adv_clip=5.0, **split(8, 8, 8, 8, weights=EVEN)),
    # whose states
    'states-teacher': arm(states='teacher'),
    'states-data': arm(states='data', data=OWN, needs=('make-own/0',)),
    'imitation': arm(rates=LOW, **IMITATE),
    'imitation-paid': arm(spent=DRAWN, **IMITATE),
    # which states
    'low': arm(query='low_noise', **SIXTEEN), 'mid': arm(query='mid_noise', **SIXTEEN),
    'high': arm(query='high_noise', **SIXTEEN), 'uniform': arm(query='uniform', **SIXTEEN),
    'states16': arm(**SIXTEEN), 'states8': arm(steps=9, drop_last=1), 'skip-last': arm(**SKIP),
    'states2': arm(steps=3, drop_last=1),
    # routing
    'one-route': arm(routes_per_step=1, routes=routes(), rates=LOW),
    'sampled': arm(routes_per_step='sample', routes=routes(), rates=LOW),
    'even': arm(**SAME_START, **split(9, 9, 8, 8, weights=EVEN)),
    'edits-hard': arm(**ON_EDITS), 'edits-soft': arm(mixing='soft', **ON_EDITS),
    # how many teachers
    'only-count': arm(**ALONE, **split(2, 2, 0, 0)),
    'only-local': arm(**ALONE, **split(2, 0, 15, 0)),
    'only-global': arm(**ALONE, **split(2, 0, 0, 15)),
    'count-local': arm(**ALONE, **split(2, 2, 15, 0)),
    'count-global': arm(**ALONE, **split(2, 2, 0, 15)),
    'local-global': arm(**ALONE, **split(2, 0, 15, 15)),
    # near the base
    'mar-01': arm(anchor='base', anchor_beta=0.01, scored=(*TAUGHT, 'open')),
    'mar-04': arm(anchor='base', anchor_beta=0.04, scored=(*TAUGHT, 'open')),
    'mar-20': arm(anchor='base', anchor_beta=0.2, scored=(*TAUGHT, 'open')),
    # size
    'rank2': arm(rank=2, alpha=2.0), 'rank8': arm(rank=8, alpha=8.0, rates=TUNED),
    'rank128': arm(rank=128, alpha=128.0, rates=TUNED), 'no-ema': arm(ema_decay=0.0),
    'batch8': arm(rates=(2e-3, 4e-3, 8e-3), **split(1, 1, 3, 3)),
    'batch17': arm(**split(1, 1, 7, 8)), 'batch68': arm(**split(4, 4, 30, 30)),
    'batch136': arm(rates=TUNED, **split(8, 8, 60, 60)),
    # guidance
    'absorbed': arm(teachers=[dict(name='guided', guidance=1.5)], data=WORD_DATA, rates=LOW,
                    routes=[dict(teacher='guided', data='t2i', samples=17),
                            dict(teacher='guided', data='open', samples=17)],
                    **FROM_BASE, **dict(HALF, scored=PLAIN_WORDS)),
    # numbers of 8 and 16 bits
    'bf16': arm(dtype='bfloat16'), 'float8': arm(base_storage='float8'),
    # distil, or reinforce
    'distilled': arm(teachers=[dict(name='clear_shapes', lora='{out}/make-clear/0'),
                               dict(name='blue', lora='{out}/make-blue/0')],
                     data=WORD_DATA, routes=PAIR, rates=LOW, **FROM_BASE, **dict(
                         HALF, needs=('make-half/0', 'make-clear/0', 'make-blue/0'))),
    'rl': arm(max_steps=43, **BOTH), 'rl-whole': arm(max_steps=343, cost=8, **BOTH),
    # not trained: the start of ours, also cut to less rank; teachers, means of them, and the
    # half-made base with its teachers
    'untrained': arm(**START), 'untrained-rank2': arm(**dict(START, rank=2)),
    'untrained-rank8': arm(**dict(START, rank=8)),
    'base': arm(init_from='base', **dict(LOOK, scored=(*TAUGHT, 'open'))),
    'teacher-count': arm(init_from=TEACHER + 'count', **LOOK),
    'teacher-local': arm(init_from=TEACHER + 'local_edit', **LOOK),
    'teacher-global': arm(init_from=TEACHER + 'global_edit', **LOOK),
    'merge-ours': merged(0.5, 2.0, 2.0), 'merge-even': merged(1.0, 1.0, 1.0),
    'merge-count': merged(2.0, 1.0, 1.0), 'merge-local': merged(1.0, 2.0, 1.0),
    'merge-global': merged(1.0, 1.0, 2.0),
    'half': arm(init_from='base', script='look', **HALF),
    'clear-alone': arm(init_from='{out}/make-clear/0', script='look', **dict(
        HALF, needs=('make-half/0', 'make-clear/0'))),
    'blue-alone': arm(init_from='{out}/make-blue/0', script='look', **dict(
        HALF, needs=('make-half/0', 'make-blue/0'))),
    'half-w1': arm(**GUIDED),
    'half-w1.5': arm(**dict(GUIDED, rollout_guidance=1.5)),
    'half-w3': arm(**dict(GUIDED, rollout_guidance=3.0))}
CEILINGS = dict(t2i='base', count='teacher-count', local_edit='teacher-local',
                global_edit='teacher-global')

# of two panels, for the README
PICTURE = [
    ('Which method? (from the merge)', ['ours', 'skip-last', 'plain', 'ode', 'sde', 'flow-k1',
                                        'imitation-paid']),
    ('Which start, which shares? (danceopd)', ['ours', 'base-ours', 'from-count', 'from-global',
                                              'from-local', 'found', 'demonstration'])]


def question(asks, claim, arms, contrasts, note=''):
    named = [Contrast(*(*x, tuple(SKILLS))[:4]) for x in contrasts]
    return Question(asks, claim, arms.split(), named, note)


PILOTS = 'mar', 'size', 'guidance', 'numbers', 'reinforce'
LOOKS = 'base teacher-count teacher-local teacher-global'
QUESTIONS = {
    'loss': question(
        'Which loss?', 'DiffusionOPD: its ODE loss converges about five times faster than that of '
        'the SDE at 0.7, and a policy gradient comes last. DanceOPD: K = 1, 2, 4 states give '
        '5.751, 4.931, 5.330 on GEdit.',
        'untrained ours skip-last k2 k4 plain states8 ode sde sde-code flow-k1 flow-group '
        'flow-paper flow-code base base-ours base-ode base-sde base-flow-k1 base-flow-group '
        'base-flow-code',
        [('ODE above SDE', 'ode', 'sde'), ('the same from the base', 'base-ode', 'base-sde'),
         ('SDE above the policy gradient', 'sde', 'flow-k1'),
         ('the same from the base', 'base-sde', 'base-flow-k1'),
         ("an SDE's own variance above that of the code", 'sde', 'sde-code'),
         ("Flow-OPD's reward as released above the policy gradient", 'flow-code', 'flow-k1'),
         ('the same from the base', 'base-flow-code', 'base-flow-k1'),
         ('the policy gradient in groups above the start', 'flow-group', 'untrained'),
         ('the same from the base', 'base-flow-group', 'base'),
         ('the reward as written above the start', 'flow-paper', 'untrained'),
         ('K = 1 above K = 2', 'skip-last', 'k2'), ('K = 1 above K = 4', 'skip-last', 'k4'),
         ('one state of five steps above nine of ten', 'skip-last', 'plain'),
         ('one state of nine steps above nine of ten', 'states8', 'plain'),
         ('the plain error above the ODE loss', 'plain', 'ode')],
        'From the merged teachers, and, base-..., from the base. plain, ode, sde and '
        'flow-... have ten steps, of which the last is not learned from, as DiffusionOPD and '
        'Flow-OPD released them, and 17 samples of nine states each (flow-group and flow-paper: '
        '32, in groups of four); plain is the error of danceopd there, with fewer updates than '
        'ode, which learns from the very states of its rollout. sde-code has the rate of sde, '
        'flow-paper that of flow-k1; untrained is the start from the merge. Without the last step '
        'as well: states8, one state of each of 34 rollouts of nine steps; skip-last, k2 and k4, '
        'with 34, 34 and 68 states an update, of 34, 17 and 17 rollouts of five.'),
    'start': question(
        'Which start?', 'DanceOPD: local edit 5.75, merged 4.19, global 2.70, t2i 1.89: more than '
        'any other choice. Flow-OPD: merged .92 on GenEval, imitated .91.',
        f'{LOOKS} merge-ours ours base-ours from-count from-local from-global from-student',
        [('merged above the base', 'ours', 'base-ours'),
         ('local above merged', 'from-local', 'ours'),
         ('local above merged, on local edits', 'from-local', 'ours', ('local_edit',)),
         ('local above merged, on counts', 'from-local', 'ours', ('count',)),
         ('merged above global', 'ours', 'from-global')],
        'from-student starts from a finished student of another seed: that cost as much again as '
        'the table says.'),
    'quality': question(
        'What do the published recipes need to hold 90 % of every teacher?', "Each's own "
        'paper has it for the best: its loss, rollout, queries and routing are taken here, its '
        'start where that is published; rank, batch and average are the common ones, and three '
        'rates were tried.',
        'ours-twice dance diffusion flow ours found found-skip demonstration demonstration-8',
        [("ours at twice the cost above DanceOPD's", 'ours-twice', 'dance'),
         ("above DiffusionOPD's", 'ours-twice', 'diffusion'),
         ("above Flow-OPD's", 'ours-twice', 'flow'),
         ('found above ours', 'found', 'ours'),
         ('found-skip above found', 'found-skip', 'found'),
         ('the demonstration above ours at twice its cost', 'demonstration', 'ours-twice'),
         ('the demonstration in batches of 8 above it', 'demonstration-8', 'demonstration')],
        "The last five at half of the others' cost. DiffusionOPD's start is not published: here "
        "the base, from which all learn less. Flow-OPD's groups have 4 samples, not 16, and its "
        'routes, which take turns, are all in each step. The demonstration was chosen among many '
        'arms by these seeds and rows, of a published recipe the rate alone. '
        'found begins with the local teacher, and gives samples to what that lacks; found-skip has '
        'five steps, of which the last, at a noise of .009, is not learned from; the demonstration '
        'has a little more of counts than that, and a little less of global edits; '
        'demonstration-8 is what the question of the batch led to, in batches of 8 at half the '
        'rate.'),
    'onpolicy': question(
        "Does it matter whose states are learned from?", "DanceOPD and DiffusionOPD: the student's "
        "own above noised data and above the teacher's rollouts; both above imitation.",
        'ours skip-last states-teacher states-data imitation imitation-paid',
        [("own above the teacher's", 'ours', 'states-teacher'),
         ('own above noised data', 'ours', 'states-data'),
         ('own above imitation', 'ours', 'imitation'),
         ('the same, the pictures counted', 'ours', 'imitation-paid'),
         ('own without the last step above imitation', 'skip-last', 'imitation'),
         ('the same, the pictures counted', 'skip-last', 'imitation-paid')],
        "Data are the teachers' own pictures of the same rows; drawing them, 19,200 forwards once, "
        'is counted for imitation-paid alone. An update costs 187 forwards, of states-data 136, of '
        'imitation 102: at equal cost these have more of them. A quarter of the states of ours is '
        'at the last step, whose noise of .009 decides nothing; skip-last has five steps and not '
        'that one. The teachers are nearly always right here, and an edit has one right picture: '
        'that favours imitation.'),
    'states': question(
        'Which states of a rollout?', 'DanceOPD: queries at low, mid, high noise give 5.751, '
        '4.649, 4.813; 16 steps. DiffusionOPD: 10 steps.',
        'ours skip-last states2 states8 states16 low mid high uniform',
        [('low noise above high', 'low', 'high'),
         ('low noise above mid', 'low', 'mid'),
         ('low noise above stratified', 'low', 'states16'),
         ('stratified above uniform', 'states16', 'uniform'),
         ('16 states above 4', 'states16', 'skip-last'),
         ('4 states above 8', 'skip-last', 'states8'),
         ('4 states above 2', 'skip-last', 'states2'),
         ('without the last step', 'skip-last', 'ours')],
        'All but ours leave out the last step, whose noise of .009 decides nothing: of a rollout '
        'of four it is half of what low noise asks for. low, mid, high and uniform have 16 '
        'states, as states16, which is stratified. Low noise needs longer rollouts, and has fewer '
        'updates. All have one rate, though they have 94 (low) to 306 (states2) updates.'),
    'routing': question(
        'Who answers, and how often?', 'DanceOPD: hard routing 5.751, soft 4.994; one route a '
        'step. DiffusionOPD: all routes in each step.',
        'ours one-route sampled even edits-hard edits-soft',
        [('all routes above one a step', 'ours', 'one-route'),
         ('each sample its own route above one a step', 'sampled', 'one-route'),
         ('weights of ours above equal ones', 'ours', 'even'),
         ('hard above soft', 'edits-hard', 'edits-soft', EDITS)],
        'one-route and sampled draw routes by their weights: a tenth of the samples are counts, of '
        'ours a seventeenth. Soft targets need rows that all teachers can answer: edits alone.'),
    'teachers': question(
        'What does a teacher more cost the others?', 'All: one student holds several teachers, and '
        'no merging of weights does.',
        'ours even count-local count-global local-global only-count only-local only-global '
        'merge-ours merge-even merge-count merge-local merge-global',
        [('counts: alone above with both edits', 'only-count', 'ours', ('count',)),
         ('counts: alone above all four in equal shares', 'only-count', 'even', ('count',)),
         ('counts: alone above with local edits', 'only-count', 'count-local', ('count',)),
         ('counts: alone above with global edits', 'only-count', 'count-global', ('count',)),
         ('local edits: alone above with the others', 'only-local', 'ours', ('local_edit',)),
         ('local edits: alone above with global ones', 'only-local', 'local-global', EDITS[:1]),
         ('global edits: alone above with the others', 'only-global', 'ours', ('global_edit',)),
         ('global edits: alone above with local ones', 'only-global', 'local-global', EDITS[1:]),
         ('edits: without counts above with them', 'local-global', 'ours', EDITS),
         *((f'distilled above {k}', 'ours', k) for k in (
             'merge-ours', 'merge-even', 'merge-count', 'merge-local', 'merge-global'))],
        'All begin with the merge of all, and give a skill as many samples in each of as many '
        'updates as ours: those with fewer teachers cost less. Counts alone have half of the loss, '
        'in ours a tenth, in even a quarter. The means of the teachers are not cut to a '
        "student's rank."),
    'mar': question(
        'What does holding near the base keep, and cost?', 'Flow-OPD: at 0.04 it keeps the quality '
        'of pictures that no teacher looks after.',
        'untrained ours mar-01 mar-04 mar-20',
        [('0.04 above 0 on what nobody teaches', 'mar-04', 'ours', ('open',)),
         ('0 above 0.04 on the skills', 'ours', 'mar-04'),
         ('0 above 0.2 on the skills', 'ours', 'mar-20')],
        'untrained is the merge: what is above it in open was learned again, not kept. In '
        'ours the base is the teacher of t2i.'),
    'size': question(
        'Which rank, which batch?', 'DanceOPD: rank 128; DiffusionOPD: rank 32, 72 samples.',
        'untrained untrained-rank2 untrained-rank8 ours rank2 rank8 rank128 batch8 batch17 batch68 '
        'batch136 no-ema',
        [('rank 32 above 2', 'ours', 'rank2'), ('rank 128 above 8', 'rank128', 'rank8'),
         ('34 samples above 136', 'ours', 'batch136'),
         ('34 samples above 8', 'ours', 'batch8'),
         ('the same on edits', 'ours', 'batch8', EDITS), ('EMA above none', 'ours', 'no-ema')],
        'A merge is cut to the rank: untrained-... are these starts. Of 8 samples one is a '
        'count, of 34 two.'),
    'guidance': question(
        'Can guidance be absorbed?', 'DanceOPD: a student without guidance learns the guided '
        "teacher's pictures.",
        'half-w1 half-w1.5 half-w3 absorbed',
        [('absorbed above the base without guidance', 'absorbed', 'half-w1', PLAIN_WORDS),
         ('absorbed above the guided base', 'absorbed', 'half-w1.5', PLAIN_WORDS)],
        'On a base stopped after 450 steps, which saw a tenth of its pictures without words; the '
        'teacher is this base at w = 1.5, better there than at 1 and 3. A picture costs 8 forwards '
        'at w = 1, else 16.'),
    'numbers': question(
        'How many bits does the frozen base need?', 'All train in bfloat16.', 'ours bf16 float8',
        [('float32 above bfloat16', 'ours', 'bf16'), ('float32 above float8', 'ours', 'float8')],
        "Whether a route's samples start from one noise is not asked: distillation has no such "
        'setting.'),
    'reinforce': question(
        'Distil two reward teachers, or reinforce both rewards at once?', 'DiffusionOPD and '
        'Flow-OPD: distilling above GRPO on mixed rewards (.92 against .73 on GenEval).',
        'half clear-alone blue-alone distilled rl rl-whole',
        [('distilled above the base', 'distilled', 'half', ('t2i', 'open', 'blue')),
         ('GRPO on both above the base', 'rl-whole', 'half', ('t2i', 'open', 'blue')),
         ('distilled above GRPO at equal forwards', 'distilled', 'rl', ('t2i', 'open', 'blue')),
         ("the same, the teachers' forwards counted", 'distilled', 'rl-whole',
          ('t2i', 'open', 'blue')),
         ('of that, what was asked for', 'distilled', 'rl-whole', ('t2i',)),
         ('of that, blue', 'distilled', 'rl-whole', ('blue',))],
        'On a base stopped after 450 steps: clear-alone is the teacher that likes clear shapes, of '
        't2i; blue-alone the one that likes blue as well, of open. GRPO has one rate, its '
        "config's; rl-whole has the cost of distilled and of both teachers. All seeds of "
        'distilled share these two.')}
