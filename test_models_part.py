# -------------------------------------------------------- tokenizer.py: efficient transformer

def randomize(module, seed=0, std=0.3):
    """Random weights everywhere: a zero output makes every perturbation test pass by silence."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        with torch.no_grad():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return module.eval()


def tiny_tokenizer(**changes):
    sizes = dict(height=8, width=12, patch=4, dim=16, encoder_layers=3, decoder_layers=3, heads=4,
                 kv_heads=2, latents=4, channels=3, pack=2, context=3, time_every=3)
    return randomize(Tokenizer(TokenizerConfig(**sizes | changes)))


def tiny_dynamics(spec=ActionSpec(categorical=(5,)), **changes):
    sizes = dict(tokens=2, channels=6, tasks=3, dim=16, layers=3, heads=4, kv_heads=2, registers=1,
                 context=4, time_every=3, k_max=8)
    return randomize(Dynamics(DynamicsConfig(**sizes | changes), spec))


def play_inputs(B=2, T=6, spec=ActionSpec(categorical=(5,)), seed=0):
    """Latents (B, T, 2, 6), actions and labelled, random."""
    generator = torch.Generator().manual_seed(seed)
    actions = {k: torch.from_numpy(x)
               for k, x in spec.sample(np.random.default_rng(seed), B, T).items()}
    return (torch.randn(B, T, 2, 6, generator=generator), actions,
            torch.ones(B, T, dtype=torch.bool))


def levels(B, T, tau=0.5, d=0.125):
    return torch.full((B, T), tau), torch.full((B, T), d)


def test_attention_equals_naive_loop():
    """Fails if heads are reshaped without transpose, GQA groups are wrong, or QK-norm, RoPE, the
    soft cap or the mask differ from a float64 loop."""
    cfg = TokenizerConfig(dim=16, heads=4, kv_heads=2, soft_cap=2.0)
    layer = randomize(Attention(cfg, "space"), std=0.6).double()
    S, E = 5, 4
    x = torch.randn(1, 1, S, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    mask = reader_mask(3, 2)
    angles = [a.double() for a in rope_angles(torch.arange(S), E)]
    got = layer(x, angles, mask)[0, 0]

    def normed(vector, gain):
        return vector / (vector.square().mean() + torch.finfo(torch.float32).eps).sqrt() * gain

    def rotated(vector, position):
        out = vector.clone()
        for i in range(E // 2):
            angle = position * 1000.0 ** (-i / (E // 2))
            a, b = vector[i], vector[i + E // 2]
            out[i] = a * math.cos(angle) - b * math.sin(angle)
            out[i + E // 2] = a * math.sin(angle) + b * math.cos(angle)
        return out

    want = torch.zeros(S, 16, dtype=torch.float64)
    for head in range(4):
        rows, kv = slice(head * E, head * E + E), head // 2
        kv_rows = slice(kv * E, kv * E + E)
        for i in range(S):
            q = rotated(normed(layer.q.weight[rows] @ x[0, 0, i], layer.q_norm.weight), i)
            scores = torch.full((S,), -math.inf, dtype=torch.float64)
            for j in range(S):
                if i >= 3 or j < 3:
                    k = rotated(normed(layer.k.weight[kv_rows] @ x[0, 0, j],
                                       layer.k_norm.weight), j)
                    scores[j] = 2.0 * torch.tanh(q @ k / math.sqrt(E) / 2.0)
            weights = scores.softmax(0)
            want[i, rows] = sum(weights[j] * (layer.v.weight[kv_rows] @ x[0, 0, j])
                                for j in range(S))
    assert torch.allclose(got, want @ layer.out.weight.T, atol=1e-5)


def test_rope_depends_on_distance_alone():
    """Fails if absolute position leaks: then a dream past the training length breaks."""
    q, k = torch.randn(2, 1, 8, generator=torch.Generator().manual_seed(0))
    dot = lambda i, j: float((rope(q, *rope_angles(torch.tensor([i]), 8))
                              * rope(k, *rope_angles(torch.tensor([j]), 8))).sum())
    assert abs(dot(3, 1) - dot(103, 101)) < 1e-4
    assert abs(dot(3, 1) - dot(3, 2)) > 1e-3            # control: distance matters


@pytest.mark.parametrize("dense", [False, True])
def test_transformer_is_causal_and_windowed(dense):
    """Fails if frame t sees frame t + 1, or more than `context` frames (mask off by one)."""
    cfg = TokenizerConfig(dim=16, heads=4, kv_heads=2, context=3, time_every=3, dense=dense)
    model = randomize(Transformer(cfg, 3))
    x = torch.randn(1, 7, 4, 16, generator=torch.Generator().manual_seed(0))
    changed = x.clone()
    changed[:, 2] += 1
    difference = (model(x, reader_mask(4, 0)) - model(changed, reader_mask(4, 0))).abs()
    by_frame = difference.amax((0, 2, 3))
    assert by_frame[:2].max() == 0 and by_frame[5:].max() == 0      # one time layer: 3 frames
    assert by_frame[2:5].min() > 1e-3                               # control


@pytest.mark.parametrize("dense", [False, True])
def test_cache_equals_full_forward(dense):
    """Fails if RoPE offset, window or ring slots are wrong: frame by frame, in chunks, and past
    the window must equal one forward over everything."""
    cfg = TokenizerConfig(dim=16, heads=4, kv_heads=2, context=3, time_every=2, dense=dense)
    model, mask = randomize(Transformer(cfg, 4)), reader_mask(3, 1)
    x = torch.randn(2, 11, 4, 16, generator=torch.Generator().manual_seed(0))
    full = model(x, mask)
    for sizes in ([1] * 11, [4, 1, 1, 5], [2, 2, 1, 1, 1, 4], [11]):
        cache, out = Cache(3), []
        for part in x.split(sizes, 1):
            out.append(model(part, mask, cache))
            cache.advance(part.shape[1])
        assert torch.allclose(torch.cat(out, 1), full, atol=1e-5), sizes


def test_single_images_see_only_themselves_in_time():
    """Fails if rows flagged as single images attend to other frames."""
    cfg = TokenizerConfig(dim=16, heads=4, kv_heads=2, context=4, time_every=2)
    model, mask = randomize(Transformer(cfg, 2)), reader_mask(3, 0)
    x = torch.randn(2, 5, 3, 16, generator=torch.Generator().manual_seed(0))
    out = model(x, mask, single=torch.tensor([True, False]))
    alone = model(x.flatten(0, 1)[:, None], mask).view_as(x)
    assert torch.allclose(out[0], alone[0], atol=1e-5)
    assert (out[1, 1:] - alone[1, 1:]).abs().max() > 1e-3           # control


def test_loss_normalizer_is_a_running_rms():
    """Fails if the loss is divided by itself (a constant 1), or terms share one estimate."""
    norm = LossNormalizer(["a", "b"], decay=0.5)
    assert abs(float(norm({"a": torch.tensor(4.0), "b": torch.tensor(0.1)})) - 2) < 1e-5
    # second call: RMS of a = sqrt((0.25 * 16 + 0.5 * 4) / 0.75) = sqrt(8)
    x = torch.tensor(2.0, requires_grad=True)
    total = norm({"a": x}, {"a": 3.0})
    total.backward()
    assert abs(float(total) - 3 * 2 / math.sqrt(8)) < 1e-5
    assert abs(float(x.grad) - 3 / math.sqrt(8)) < 1e-5             # the RMS is detached


# ------------------------------------------------------------- tokenizer.py: causal tokenizer

def test_patchify_round_trip():
    """Fails if height and width are swapped, or padding is not cropped."""
    for H, W in ((8, 12), (10, 13)):
        x = torch.randn(2, 3, H, W, 3)
        patches = patchify(x, 4)
        assert patches.shape == (2, 3, -(-H // 4) * -(-W // 4), 48)
        assert torch.equal(unpatchify(patches, 4, H, W), x)
    x = torch.arange(8 * 12 * 3.0).view(1, 1, 8, 12, 3)
    assert torch.equal(patchify(x, 4)[0, 0, 1].view(4, 4, 3), x[0, 0, :4, 4:8])


def test_mae_mask_drops_its_share_per_image():
    """Fails if the polarity is flipped, or one p serves the whole batch."""
    generator = torch.Generator().manual_seed(0)
    mask = mae_mask(64, 8, 4000, 0.9, generator, "cpu")
    share = mask.float().mean(2)
    p = 0.9 * torch.rand(64, 8, 1, generator=torch.Generator().manual_seed(0))[..., 0]
    assert (share - p).abs().max() < 4 * 0.5 / math.sqrt(4000)
    assert share.std() > 0.2 and abs(float(share.mean()) - 0.45) < 0.05
    assert not mae_mask(4, 2, 9, 0.0, generator, "cpu").any()


def test_mae_mask_hides_patches_and_evaluation_never_masks():
    """Fails if a hidden patch still reaches the latents, or encode drops patches."""
    model = tiny_tokenizer()
    frames = torch.randint(256, (1, 2, 8, 12, 3), dtype=torch.uint8)
    x, other = scale_pixels(frames), scale_pixels(frames)
    other[:, :, :4, :4] += 1                                        # patch 0
    hidden = torch.zeros(1, 2, 6, dtype=torch.bool)
    assert (model.bottleneck(x, hidden) - model.bottleneck(other, hidden)).abs().max() > 1e-4
    hidden[..., 0] = True
    assert torch.equal(model.bottleneck(x, hidden), model.bottleneck(other, hidden))
    assert torch.equal(model.encode(frames), model.encode(frames))
    assert torch.equal(model.bottleneck(x).view(1, 2, 2, 6), model.encode(frames))


def test_tokenizer_masks_are_one_way():
    """Fails if encoder patches see latents, decoder latents see patch queries, or a later frame
    changes an earlier latent."""
    model = tiny_tokenizer()
    P, N = model.patches, model.cfg.latents
    for mask, others in ((model.encoder_mask(), P), (model.decoder_mask(), N)):
        assert not mask[:others, others:].any() and mask[:others, :others].all()
        assert mask[others:].all()
    x = torch.randn(1, 4, P + N, 16, generator=torch.Generator().manual_seed(0))
    moved = x.clone()
    moved[:, :, P:] += 1
    change = (model.encoder(x, model.encoder_mask()) - model.encoder(moved, model.encoder_mask()))
    assert change[:, :, :P].abs().max() == 0 and change[:, :, P:].abs().max() > 1e-3
    frames = torch.randn(1, 4, 8, 12, 3)
    later = frames.clone()
    later[:, 3] += 1
    change = (model.bottleneck(frames) - model.bottleneck(later)).abs().amax((0, 2, 3))
    assert change[:3].max() == 0 and change[3] > 1e-3


def test_bottleneck_is_bounded_and_informative():
    """Fails if tanh is dropped, or the latents ignore the image."""
    model = tiny_tokenizer()
    model.latent_out.weight.data.mul_(20)
    z = model.bottleneck(10 * torch.randn(3, 2, 8, 12, 3))
    assert z.abs().max() <= 1 and z.abs().max() > 0.9
    assert (z[0] - z[1]).abs().max() > 1e-3


def test_tokenizer_streams_frame_by_frame():
    """Fails if streaming encode or decode differs from the whole clip, or packing from its
    inverse, or the stored latent scale is not undone."""
    model = tiny_tokenizer()
    model.latent_std.fill_(0.5)
    frames = torch.randint(256, (2, 7, 8, 12, 3), dtype=torch.uint8)
    z = model.encode(frames)
    assert z.shape == (2, 7, 2, 6)
    cache, back = model.new_cache(), model.new_cache()
    parts = [model.encode(frames[:, t:t + 1], cache) for t in range(7)]
    assert torch.allclose(torch.cat(parts, 1), z, atol=1e-5)
    whole = model.decode(z).int()
    parts = torch.cat([model.decode(z[:, t:t + 1], back) for t in range(7)], 1).int()
    assert (parts - whole).abs().max() <= 1
    x = model.reconstruct(model.bottleneck(scale_pixels(frames)))
    want = (255 * (x * PIXEL_STD + PIXEL_MEAN)).round().clamp(0, 255)
    assert (whole - want).abs().max() <= 1


def test_eq5_reconstruction_loss():
    """Fails if Eq. 5's terms are mixed up, or LPIPS sees other than [-1, 1]."""
    x = scale_pixels(torch.tensor([0, 255], dtype=torch.uint8).view(1, 1, 1, 2, 1)
                     .expand(1, 1, 4, 2, 3))
    seen = []
    losses = reconstruction_loss(x + 2, x, lambda a, b: seen.append((a, b)) or (a - b).abs())
    assert abs(float(losses["mse"]) - 4) < 1e-5
    assert seen[0][1].shape == (1, 3, 4, 2)
    assert abs(float(seen[0][1].min()) + 1) < 1e-5 and abs(float(seen[0][1].max()) - 1) < 1e-5
    assert list(reconstruction_loss(x, x)) == ["mse"]


# ---------------------------------------------------------------------- dynamics.py: equations

def test_eq4_tau_and_d_lie_on_the_grid():
    """Fails if a level is never drawn, tau is off d's grid or reaches 1, or frames of a row
    share one draw."""
    tau, d = sample_tau_d(400, 50, 16, 400, torch.Generator().manual_seed(0))
    assert set(d.unique().tolist()) == {1 / 2 ** i for i in range(5)}
    assert torch.equal(tau / d, (tau / d).round()) and (tau >= 0).all() and (tau + d <= 1).all()
    n = d.numel()
    for i in range(5):
        k = 2 ** i
        share = (d == 1 / k).float().mean()
        assert abs(share - 0.2) < 4 * math.sqrt(0.16 / n)           # uniform over log2 d
        counts = torch.bincount((tau[d == 1 / k] * k).long(), minlength=k) / (d == 1 / k).sum()
        assert counts.numel() == k and (counts - 1 / k).abs().max() < 4 / math.sqrt(n / 5 * k)
    assert (d[:, 1:] != d[:, :-1]).float().mean() > 0.7             # drawn for each frame
    _, d = sample_tau_d(8, 5, 16, 3, torch.Generator().manual_seed(0))
    assert (d[3:] == 1 / 16).all() and (d[:3] > 1 / 16).any()


def test_eq6_corrupt_broadcasts_over_frames():
    """Fails if tau (B, T) is applied to the wrong axes."""
    B, T = 3, 5
    z0, z1, tau = torch.randn(B, T, 2, 4), torch.randn(B, T, 2, 4), torch.rand(B, T)
    got = corrupt(z0, z1, tau)
    for b in range(B):
        for t in range(T):
            assert torch.allclose(got[b, t], (1 - tau[b, t]) * z0[b, t] + tau[b, t] * z1[b, t])
    assert torch.equal(corrupt(z0, z1, torch.ones(B, T)), z1)       # tau = 1 is data


def test_eq6_velocity_output_is_turned_into_latents():
    """Fails if the v-prediction ablation scales by tau in place of 1 - tau."""
    z0, z1, tau = torch.randn(2, 3, 2, 4), torch.randn(2, 3, 2, 4), torch.rand(2, 3)
    assert torch.allclose(x_prediction(z1 - z0, corrupt(z0, z1, tau), tau, "v"), z1, atol=1e-5)
    assert torch.equal(x_prediction(z1, z0, tau, "x"), z1)


@pytest.mark.parametrize("space", ["x", "v"])
def test_eq7_perfect_predictor_has_no_loss(space):
    """Fails if a division by 1 - tau is missing: a predictor of z1 makes every bootstrap target
    z1 at every (tau, d)."""
    tau, d = sample_tau_d(20, 6, 16, 20, torch.Generator().manual_seed(0))
    z0, z1 = torch.randn(20, 6, 2, 3), torch.randn(20, 6, 2, 3)
    z_tilde = corrupt(z0, z1, tau)
    f = lambda z, tau, d: z1
    assert shortcut_loss(f, z1, z_tilde, z1, tau, d, 1 / 16, space).max() < 1e-6
    assert shortcut_loss(f, z1 + 1, z_tilde, z1, tau, d, 1 / 16, space).min() > 0.9     # control


def test_eq7_toy_by_hand():
    """Fails if a half step, or tau + d/2, is wrong. f(z) = z/2, z_tilde = 1, tau = 0, d = 1/2:
    b1 = -1/2, z' = 7/8, b2 = -7/12, mean -13/24; a prediction of 0 costs (11/24)^2."""
    one = torch.ones(1, 1, 1, 1)
    tau, d = torch.zeros(1, 1), torch.full((1, 1), 0.5)
    f = lambda z, tau, d: z / 2
    loss = shortcut_loss(f, 0 * one, one, 5 * one, tau, d, 1 / 4)
    assert abs(float(loss) - (11 / 24) ** 2) < 1e-6
    # tau = 1/2, same f: b1 = -1, z' = 3/4, b2 = -3/2, mean -5/4, target 1 - 5/8 = 3/8
    loss = shortcut_loss(f, 0 * one, one, 5 * one, tau + 0.5, d, 1 / 4)
    assert abs(float(loss) - (3 / 8) ** 2) < 1e-6
    loss = shortcut_loss(f, 0 * one, one, 5 * one, tau + 0.5, d, 1 / 4, "v")
    assert abs(float(loss) - (3 / 4) ** 2) < 1e-6
    assert abs(float(shortcut_loss(f, 0 * one, one, 5 * one, tau, d, 1 / 2)) - 25) < 1e-5   # d_min


def test_eq7_calls_the_network_at_half_steps_without_gradient():
    """Fails if the stop-gradient is lost, or the labels are not (tau, d/2), (tau + d/2, d/2), or
    frames at d_min move."""
    calls, weight = [], torch.tensor(0.7, requires_grad=True)

    def f(z, tau, d):
        calls.append((z.clone(), tau.clone(), d.clone()))
        return z * weight

    tau, d = torch.tensor([[0.5, 0.25]]), torch.tensor([[0.5, 0.125]])
    z = torch.randn(1, 2, 2, 3)
    shortcut_loss(f, z * weight, z, z + 1, tau, d, 0.125).sum().backward()
    (z1, tau1, d1), (z2, tau2, d2) = calls
    assert torch.equal(tau1, tau) and torch.equal(tau2, torch.tensor([[0.75, 0.25]]))
    assert torch.equal(d1, d2) and torch.equal(d1, torch.tensor([[0.25, 0.125]]))
    assert torch.equal(z1, z2) is False and torch.equal(z1[:, 1], z2[:, 1])
    by_hand = weight.detach().clone().requires_grad_(True)
    with torch.no_grad():
        target = z + 0.5 * ((z1 * 0.7 - z1) / 0.5 + (z2 * 0.7 - z2) / 0.25) / 2
    error = torch.cat([(z * by_hand - target)[:, :1], (z * by_hand - (z + 1))[:, 1:]], 1)
    error.square().mean((2, 3)).sum().backward()
    assert torch.allclose(weight.grad, by_hand.grad, atol=1e-5)


def test_eq8_ramp_weight():
    """Fails if the ramp is flipped."""
    assert torch.allclose(ramp_weight(torch.tensor([0.0, 0.5, 1.0])), torch.tensor([0.1, 0.55, 1]))


@pytest.mark.parametrize("k", [1, 2, 4])
def test_eq2_sampler_with_an_oracle_ends_at_the_data(k):
    """Fails if the last step is skipped, or a step is labelled with the level it goes to."""
    z1, labels = torch.randn(2, 1, 2, 3), []

    def f(z, tau, d):
        labels.append((float(tau[0, 0]), float(d[0, 0])))
        return z1

    assert torch.allclose(euler_sample(f, torch.randn(2, 1, 2, 3), k), z1, atol=1e-6)
    assert labels == [(i / k, 1 / k) for i in range(k)]
    labels.clear()
    euler_sample(f, torch.randn(2, 1, 2, 3), k, d_label=1 / 8)
    assert {d for _, d in labels} == {1 / 8}


def test_eq2_sampler_follows_a_straight_line():
    """Fails if the velocity is not (x - z) / (1 - tau): after one of two steps of an oracle the
    point lies half way."""
    z0, z1, seen = torch.randn(1, 1, 1, 4), torch.randn(1, 1, 1, 4), []
    euler_sample(lambda z, tau, d: seen.append(z) or z1, z0, 2)
    assert torch.allclose(seen[1], (z0 + z1) / 2, atol=1e-6)


# ------------------------------------------------------------------------ dynamics.py: network

def test_dynamics_is_causal_in_time():
    """Fails if frame t sees frame t + 1."""
    model = tiny_dynamics()
    z, actions, labelled = play_inputs(1, 4)
    changed = z.clone()
    changed[:, 2:] += 1
    past, future = (model(z, *levels(1, 4), actions, labelled)[0]
                    - model(changed, *levels(1, 4), actions, labelled)[0]
                    ).abs().amax((0, 2, 3)).split(2)
    assert past.max() == 0 and future.min() > 1e-3


def test_actions_change_their_own_frame_and_later_ones():
    """Fails if actions[:, t] reaches frame t - 1, or not frame t."""
    model = tiny_dynamics()
    z, actions, labelled = play_inputs(1, 5)
    other = {k: x.clone() for k, x in actions.items()}
    other["categorical"][:, 2] = (other["categorical"][:, 2] + 1) % 5
    change = (model(z, *levels(1, 5), actions, labelled)[0]
              - model(z, *levels(1, 5), other, labelled)[0]).abs().amax((0, 2, 3))
    assert change[:2].max() == 0 and change[2:].min() > 1e-4


def test_unlabelled_frames_have_the_base_embedding_alone():
    """Fails if an unlabelled or single-image frame still sees its action, or parts of an action
    are not summed."""
    spec = ActionSpec(binary=2, categorical=(3, 4), continuous=2)
    embed = randomize(ActionEmbedding(spec, 2, 8))
    actions = {k: torch.from_numpy(x)
               for k, x in spec.sample(np.random.default_rng(0), 3, 4).items()}
    labelled = torch.tensor([[True, False, True, False]] * 3)
    out = embed(actions, labelled)
    assert torch.equal(out[:, 1], embed.base.expand(3, 2, 8))
    key = actions["binary"][0, 0].long()
    a, b = actions["categorical"][0, 0]
    want = (embed.binary.weight[key[0]] + embed.binary.weight[2 + key[1]]
            + embed.categorical.weight[a] + embed.categorical.weight[3 + b]
            + embed.continuous.weight @ actions["continuous"][0, 0])
    assert torch.allclose(out[0, 0], embed.base + want.view(2, 8), atol=1e-5)
    model = tiny_dynamics()
    z, actions, labelled = play_inputs(1, 3)
    single = torch.tensor([True])
    assert torch.equal(model(z, *levels(1, 3), actions, labelled, single=single)[0],
                       model(z, *levels(1, 3), actions, ~labelled, single=single)[0])


def test_tau_and_d_labels_reach_the_prediction_one_by_one():
    """Fails if two levels share an embedding row."""
    model = tiny_dynamics()
    z, actions, labelled = play_inputs(1, 1)
    outs = [model(z, *levels(1, 1, tau, d), actions, labelled)[0]
            for d in (1.0, 0.5, 0.25, 0.125) for tau in np.arange(0, 1, d)]
    for i, a in enumerate(outs):
        for b in outs[:i]:
            assert (a - b).abs().max() > 1e-4


def test_agent_token_is_unseen_and_sees_all():
    """Fails if the world model sees the task (causal confusion), or the agent is inert."""
    model = tiny_dynamics()
    z, actions, labelled = play_inputs(1, 4)
    tau, d = levels(1, 4)
    task = torch.zeros(1, 4, dtype=torch.long)
    z_a, h_a = model(z, tau, d, actions, labelled, task)
    z_b, h_b = model(z, tau, d, actions, labelled, task + 1)
    z_none, h_none = model(z, tau, d, actions, labelled)
    assert torch.equal(z_a, z_b) and torch.allclose(z_a, z_none, atol=1e-6) and h_none is None
    assert (h_a - h_b).abs().min(-1)[0].max() >= 0 and (h_a - h_b).abs().max() > 1e-3
    changed = z.clone()
    changed[:, 1] += 1
    change = (model(changed, tau, d, actions, labelled, task)[1] - h_a).abs().amax((0, 2))
    assert change[0] == 0 and change[1:].min() > 1e-3


def test_context_label_equals_the_noise_added():
    """Fails if a clean label is put on noisy context, or the pair (tau, d) is one that training
    never draws."""
    model, seen = tiny_dynamics(k_max=16), []
    model.register_forward_hook(lambda m, args, out: seen.append(args))
    z, actions, labelled = play_inputs(1, 3)
    z = z * 0 + 7.0
    dream = Dream(model, torch.Generator().manual_seed(0))
    dream.commit(z, actions, labelled)
    z_tilde, tau, d = seen[0][:3]
    noise = torch.randn(1, 3, 2, 6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(z_tilde, corrupt(noise, z, tau))
    assert (tau == 14 / 16).all() and (d == 1 / 16).all()           # 0.9 snapped to the grid
    drawn_tau, drawn_d = sample_tau_d(500, 8, 16, 0, torch.Generator().manual_seed(0))
    assert ((drawn_tau == 14 / 16) & (drawn_d == 1 / 16)).any()


def test_dream_keeps_one_frame_per_commit():
    """Fails if denoising passes stay in the cache: K passes and a commit must equal a full
    forward over the committed frames, past the window."""
    model = tiny_dynamics()
    z, actions, labelled = play_inputs(2, 9)
    task = torch.ones(2, 9, dtype=torch.long)
    dream = Dream(model, torch.Generator().manual_seed(0))
    pieces, hs = [], []

    def capture(module, args, out):
        pieces.append(args[0])

    part = lambda t: ({k: x[:, t:t + 1] for k, x in actions.items()}, labelled[:, t:t + 1],
                      task[:, t:t + 1])
    for t in range(9):
        imagined = dream.imagine(*part(t))
        assert dream.cache.t == t and torch.isfinite(imagined).all()
        handle = model.register_forward_hook(capture)
        hs.append(dream.commit(z[:, t:t + 1], *part(t)))
        handle.remove()
        assert dream.cache.t == t + 1
    tau, d = levels(2, 9, model.tau_ctx)
    _, h = model(torch.cat(pieces, 1), tau, d, actions, labelled, task)
    assert torch.allclose(torch.cat(hs, 1), h, atol=1e-5)


def test_dynamics_loss_rows():
    """Fails if rows outside the dynamics loss leak gradient into it, context-level rows are not
    at tau_ctx, or the bootstrap rows are not the first ones."""
    model = tiny_dynamics()
    z, actions, labelled = play_inputs(6, 4)
    seen = []
    handle = model.register_forward_hook(lambda m, args, out: seen.append(args))
    z.requires_grad_(True)
    losses, h, metrics = dynamics_losses(model, z, actions, labelled, 2,
                                         torch.Generator().manual_seed(0), 4,
                                         torch.zeros(6, 4, dtype=torch.long), context_level=2)
    handle.remove()
    (losses["flow"] + losses["boot"]).backward()
    assert z.grad[4:].abs().max() == 0 and z.grad[:4].abs().amax((1, 2, 3)).min() > 0
    assert (seen[0][1][4:] == model.tau_ctx).all() and len(seen) == 3
    assert [len(args[0]) for args in seen] == [6, 2, 2] and h.shape == (6, 4, 16)
    assert (seen[0][2][2:] == model.d_min).all()


# ------------------------------------------------------------------------------------ agent.py

def tiny_agent(spec=ActionSpec(categorical=(5,)), **changes):
    return randomize(Agent(AgentConfig(**dict(hidden=16, mtp=2, bins=31) | changes), 16, spec))


def test_eq9_targets():
    """Fails if the policy's target is not actions[t + 1 + n], the reward's not rewards[t + n], or
    entries past the end of the window are used (wrap-around)."""
    x = torch.arange(10).view(1, 10)
    for first in (0, 1):
        ahead, valid = targets_ahead(x, first, 3)
        assert ahead.shape == valid.shape == (1, 10, 4)
        for t in range(10):
            for n in range(4):
                assert bool(valid[0, t, n]) == (t + first + n < 10)
                if valid[0, t, n]:
                    assert ahead[0, t, n] == t + first + n


def test_eq9_loss_averages_valid_entries():
    """Fails if masked entries count, or the sign is flipped."""
    log_p = torch.tensor([[[-1.0, -100.0], [-3.0, -100.0]]])
    valid = torch.tensor([[[True, False], [True, False]]])
    policy, reward = behavior_loss(log_p, valid, 2 * log_p, valid)
    assert float(policy) == 2 and float(reward) == 4
    assert float(behavior_loss(log_p, valid & False, log_p, valid)[0]) == 0


def test_eq9_random_actions_cannot_be_cloned():
    """Fails if a label leaks into h (a_t as its own target): i.i.d. actions have entropy ln 5."""
    torch.manual_seed(0)
    spec = ActionSpec(categorical=(5,))
    model, agent = tiny_dynamics(), Agent(AgentConfig(hidden=32, mtp=1, bins=31), 16, spec)
    parameters = [*model.parameters(), *agent.parameters()]
    optimizer = torch.optim.Adam([p for p in parameters if p.requires_grad], 1e-2)
    nlls, copies = [], []
    for step in range(120):
        z, actions, labelled = play_inputs(32, 6, seed=step)
        task = torch.zeros(32, 6, dtype=torch.long)
        _, h = model(z, *levels(32, 6, 0.875), actions, labelled, task)
        losses, metrics = agent_losses(agent, h, actions, labelled, torch.zeros(32, 6),
                                       torch.ones(32, 6), torch.ones(32, dtype=torch.bool))
        # control: a_t itself can be read from h_t, by the head at distance 1
        copy = -action_log_prob(spec, agent.policy(h)[:, :, 1], actions).mean()
        optimizer.zero_grad()
        (losses["bc"] + copy).backward()
        optimizer.step()
        nlls.append(float(metrics["bc_next_action"]))
        copies.append(float(copy))
    assert np.mean(nlls[-30:]) > math.log(5) - 0.05
    assert np.mean(copies[-30:]) < 1.0


def test_agent_losses_respect_rows_and_labels():
    """Fails if BC counts rows that are not relevant or unlabelled actions, or reward and continue
    losses skip rows."""
    agent = tiny_agent()
    h = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    _, actions, labelled = play_inputs(3, 5)
    labelled[2, 3] = False
    relevant = torch.tensor([False, True, True])
    rewards, continues = torch.zeros(3, 5), torch.ones(3, 5)
    call = lambda a, r, c: agent_losses(agent, h, a, labelled, r, c, relevant)[0]
    base = call(actions, rewards, continues)

    def with_action(row, t):
        other = {k: x.clone() for k, x in actions.items()}
        other["categorical"][row, t] = (other["categorical"][row, t] + 1) % 5
        return float(call(other, rewards, continues)["bc"] - base["bc"])

    assert with_action(0, 2) == 0 and with_action(2, 3) == 0 and with_action(1, 0) == 0
    assert with_action(1, 2) != 0 and with_action(2, 2) != 0
    for row in range(3):
        changed = rewards.clone()
        changed[row, 2] = 1
        assert call(actions, changed, continues)["reward"] != base["reward"]
        changed = continues.clone()
        changed[row, 4] = 0
        assert call(actions, rewards, changed)["continue"] != base["continue"]


def test_two_hot_round_trip():
    """Fails if the bins are reversed, the weights swapped, or the ends wrap around."""
    bins = symexp_bins(255)
    x = torch.tensor([-1e9, -30.0, -1.0, -0.3, 0.0, 1e-3, 0.5, 1.0, 7.7, 1e9])
    weights = two_hot(x, bins)
    assert torch.allclose(weights.sum(-1), torch.ones(10)) and (weights >= 0).all()
    assert ((weights > 0).sum(-1) <= 2).all()
    assert torch.allclose((weights * bins).sum(-1)[1:-1], x[1:-1], rtol=1e-4, atol=1e-5)
    assert weights[0, 0] == 1 and weights[-1, -1] == 1
    used = weights[6].nonzero().flatten()
    assert used.tolist() == [int((bins <= 0.5).sum()) - 1, int((bins <= 0.5).sum())]
    logits = torch.log(two_hot(torch.tensor([0.37]), bins).clamp_min(1e-30))
    assert abs(float(two_hot_mean(logits, bins)) - 0.37) < 1e-4
    best = two_hot_log_prob(logits, torch.tensor([0.37]), bins)
    assert best > two_hot_log_prob(logits, torch.tensor([1.5]), bins)


def test_action_distributions_against_closed_forms():
    """Fails if keys and categories are mixed up, a sign is flipped, or samples do not follow the
    probabilities."""
    spec = ActionSpec(binary=2, categorical=(3, 2))
    logits = torch.randn(7, generator=torch.Generator().manual_seed(0))
    prior = torch.randn(7, generator=torch.Generator().manual_seed(1))
    p, q = logits.double(), prior.double()
    outcomes, kl = [], 0.0
    for k0 in (0, 1):
        for k1 in (0, 1):
            for a in range(3):
                for b in range(2):
                    def prob(x):
                        keys = [x[i].sigmoid() if k else 1 - x[i].sigmoid()
                                for i, k in ((0, k0), (1, k1))]
                        return keys[0] * keys[1] * x[2:5].softmax(0)[a] * x[5:].softmax(0)[b]
                    action = {"binary": torch.tensor([k0, k1]), "categorical": torch.tensor([a, b])}
                    got = action_log_prob(spec, logits, action)
                    assert abs(float(got) - float(prob(p).log())) < 1e-5
                    outcomes.append(float(prob(p)))
                    kl += float(prob(p) * (prob(p).log() - prob(q).log()))
    assert abs(sum(outcomes) - 1) < 1e-6
    assert abs(float(action_kl(spec, logits, prior)) - kl) < 1e-5
    draws = sample_action(spec, logits.expand(20000, 7), torch.Generator().manual_seed(0))
    assert (draws["binary"].float().mean(0) - logits[:2].sigmoid()).abs().max() < 0.02
    shares = torch.bincount(draws["categorical"][:, 0], minlength=3) / 20000
    assert (shares - logits[2:5].softmax(0)).abs().max() < 0.02
    cold = sample_action(spec, logits.expand(50, 7), torch.Generator().manual_seed(0), 1e-4)
    assert (cold["categorical"][:, 0] == logits[2:5].argmax()).all()


def test_prior_kl_is_reverse():
    """Fails if the direction is swapped: KL[pi || prior] of (1/2, 1/2) against (9/10, 1/10) is
    ln(5/3) = 0.5108, the other way 0.3681; zero at equality."""
    spec = ActionSpec(categorical=(2,))
    pi, prior = torch.zeros(2), torch.tensor([0.9, 0.1]).log()
    assert abs(float(action_kl(spec, pi, prior)) - 0.5 * math.log(25 / 9)) < 1e-5
    assert abs(float(action_kl(spec, prior, pi)) - 0.3681) < 1e-3
    assert float(action_kl(spec, prior, prior)) == 0


def test_eq10_lambda_returns_by_hand():
    """Fails if an index shifts: r = (1, 2, 3), v = (10, 20, 30), gamma = lambda = 1/2 gives
    (11.5, 18, 30); c = 0 cuts."""
    r, v = torch.tensor([[1.0, 2, 3]]), torch.tensor([[10.0, 20, 30]])
    c = torch.ones(1, 3)
    want = torch.tensor([[8.5, 10.5, 30.0]])
    want = torch.tensor([[2 + 0.5 * (0.5 * 20 + 0.5 * 18), 3 + 0.5 * 30, 30.0]])
    assert torch.allclose(want, torch.tensor([[11.5, 18, 30]]))
    assert torch.allclose(lambda_returns(r, c, v, 0.5, 0.5), want)
    c[0, 2] = 0
    assert torch.allclose(lambda_returns(r, c, v, 0.5, 0.5),
                          torch.tensor([[2 + 0.5 * (10 + 1.5), 3, 30.0]]))


def test_eq10_lambda_returns_equal_the_sum_of_n_step_returns():
    """Fails if lambda mixes the wrong terms: the definition by n-step returns, in float64."""
    generator = torch.Generator().manual_seed(0)
    r, v, c = (torch.rand(4, 7, generator=generator, dtype=torch.float64) for _ in range(3))
    gamma, lam, T = 0.9, 0.7, 6
    got = lambda_returns(r, c, v, gamma, lam)
    for b in range(4):
        for t in range(T):
            n_step = []
            for n in range(1, T - t + 1):
                total, discount = 0.0, 1.0
                for i in range(1, n + 1):
                    total += discount * r[b, t + i]
                    discount *= gamma * c[b, t + i]
                n_step.append(total + discount * v[b, t + n])
            want = sum((1 - lam) * lam ** i * x for i, x in enumerate(n_step[:-1]))
            want = want + lam ** (len(n_step) - 1) * n_step[-1]
            assert abs(float(got[b, t] - want)) < 1e-9


def test_eq10_value_loss_pulls_towards_the_return():
    """Fails if the target is not detached, or the head learns another number than the return."""
    bins, logits = symexp_bins(63), torch.zeros(1, 63, requires_grad=True)
    target = torch.tensor([1.3], requires_grad=True)
    optimizer = torch.optim.Adam([logits], 0.2)
    for _ in range(200):
        optimizer.zero_grad()
        value_loss(logits, target, bins).backward()
        optimizer.step()
    assert abs(float(two_hot_mean(logits, bins).detach()) - 1.3) < 0.05 and target.grad is None


def test_eq11_gradient_signs_and_weights():
    """Fails if the sign is flipped, the magnitude of A leaks, D+ and D- share one mean, or an
    empty set gives 0/0. A = (3, .1, 0, -2, -.5): -1/6 three times, +1/4 twice."""
    def gradient(advantages, alpha=0.5):
        log_p = torch.zeros(1, len(advantages), requires_grad=True)
        pmpo_loss(log_p, torch.tensor([advantages]), torch.zeros(1, len(advantages)), alpha,
                  0.3).backward()
        return log_p.grad[0]

    want = torch.tensor([-1 / 6] * 3 + [1 / 4] * 2)
    assert torch.allclose(gradient([3.0, 0.1, 0.0, -2.0, -0.5]), want)
    assert torch.allclose(gradient([300.0, 10.0, 0.0, -200.0, -50.0]), want)
    assert torch.allclose(gradient([1.0, -1.0], alpha=0.8), torch.tensor([-0.8, 0.2]))
    assert torch.allclose(gradient([1.0, 2.0]), torch.tensor([-0.25, -0.25]))
    assert torch.allclose(gradient([-1.0, -2.0]), torch.tensor([0.25, 0.25]))
    kl = torch.tensor([[1.0, 3.0]], requires_grad=True)
    loss = pmpo_loss(torch.zeros(1, 2), torch.ones(1, 2), kl, 0.5, 0.3)
    loss.backward()
    assert abs(float(loss) - 0.6) < 1e-6 and torch.allclose(kl.grad, torch.tensor([[0.15, 0.15]]))


def test_imagination_returns_align_with_actions():
    """Fails if the advantage scores the action before or after: reward comes exactly when action 3
    leads to a frame, so only action 3 may be scored up."""
    agent = tiny_agent(gamma=0.0)
    h = torch.randn(64, 6, 16, generator=torch.Generator().manual_seed(0))
    chosen = {"categorical": torch.randint(5, (64, 5, 1), generator=torch.Generator().manual_seed(1)),
              "binary": torch.zeros(64, 5, 0)}
    rewards = torch.zeros(64, 6)
    rewards[:, 1:] = (chosen["categorical"][..., 0] == 3).float()
    agent.rewards, agent.values = (lambda _: rewards), (lambda _: torch.full((64, 6), 0.5))
    logits = torch.zeros(64, 5, 1, 5, requires_grad=True)
    agent.policy.forward = lambda _: logits
    losses, metrics = imagination_losses(agent, h, chosen)
    losses["policy"].backward()
    taken = logits.grad[:, :, 0].gather(-1, chosen["categorical"])[..., 0]
    assert (taken[rewards[:, 1:] == 1] < 0).all() and (taken[rewards[:, 1:] == 0] > 0).all()


def test_imagination_step_changes_policy_and_value_alone():
    """Fails if the optimizer holds other parameters, the prior gets a gradient, or h carries one
    back into the transformer."""
    model, agent = tiny_dynamics(), tiny_agent()
    z, actions, labelled = play_inputs(4, 3)
    before = {n: p.clone() for n, p in [*model.named_parameters(), *agent.named_parameters()]}
    h, chosen, frames = imagine_rollout(model, agent, z, actions, labelled,
                                        torch.zeros(4, 3, dtype=torch.long), 5,
                                        torch.Generator().manual_seed(0))
    assert h.shape == (4, 6, 16) and frames.shape == (4, 5, 2, 6)
    assert chosen["categorical"].shape == (4, 5, 1) and not h.requires_grad
    losses, _ = imagination_losses(agent, h, chosen)
    (losses["policy"] + losses["value"]).backward()
    touched = {n.split(".")[0] for n, p in agent.named_parameters() if p.grad is not None}
    assert touched == {"policy", "value"}
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())
    agent.freeze_prior()
    losses, metrics = imagination_losses(agent, h, chosen)
    assert abs(float(metrics["kl_prior"])) < 1e-6


def test_continue_probability_is_calibrated():
    """Fails if the weight of the rare class is not undone: trained with weight w on a coin that
    ends 1 time in 10, the head must answer 0.9."""
    torch.manual_seed(0)
    agent = Agent(AgentConfig(hidden=8, mtp=0, bins=5, terminal_weight=20.0), 16,
                  ActionSpec(categorical=(2,)))
    continues = torch.ones(10, 10)
    continues[:, 0] = 0
    h, optimizer = torch.ones(10, 10, 16), torch.optim.Adam(agent.continues.parameters(), 1e-2)
    _, actions, labelled = play_inputs(10, 10, ActionSpec(categorical=(2,)))
    for _ in range(300):
        optimizer.zero_grad()
        agent_losses(agent, h, actions, labelled, torch.zeros(10, 10), continues,
                     torch.ones(10, dtype=torch.bool))[0]["continue"].backward()
        optimizer.step()
    assert abs(float(agent.continue_prob(h)[0, 0].detach()) - 0.9) < 0.01
