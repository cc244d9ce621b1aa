// The seven quick checks, and why each answer is right or wrong. Knows no page: numbers in the
// answers are counted from the shapes of the models.

// questions(count) -> [{text, options: [{text, right, why}]}]. `count(name, r, targets)` is
// countLora of the model `name`.
function questions(count) {
  const all = (name) =>
    count(name, 16, ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]);
  const qv = (name) => count(name, 16, ["q_proj", "v_proj"]);
  const reduction = ({ trainable, all: numbers }) => percent(1 - trainable / (numbers - trainable));
  const square = 16 * (768 + 768);
  const llama = count("llama-2-7b", 16, ["q_proj", "v_proj"]);
  const seven = llama.all - llama.trainable;
  return [
    {
      text: "Why start from a pre-trained model, and not from nothing?",
      options: [
        {
          text:
            "It has learned the language already; a small update is enough to turn that to a " +
            "task",
          right: true,
          why:
            "An adapter bends what is there. On a base that knows nothing it can learn simple " +
            "rules, but no language.",
        },
        {
          text: "A model with random weights cannot be trained by gradients",
          why: "It can: that is how the base was made. It takes far more text and time.",
        },
        {
          text: "The update is smaller, so the model answers faster",
          why: "Speed depends on the shapes of the layers, not on where their numbers come from.",
        },
      ],
    },
    {
      text: "What is hardest about training all numbers of a 7B model?",
      options: [
        {
          text: "Memory: beside each number lie its gradient and two moments of Adam",
          right: true,
          why:
            `In float32 that is 16 bytes a number: ${bytesText(16 * seven)} for the ` +
            `${whole(seven)} of Llama-2-7B, activations aside. Adam's moments are two, ` +
            `${bytesText(8 * seven)}; who counts one arrives at a quarter less.`,
        },
        {
          text: "Disk: the trained model does not fit on one",
          why:
            `It takes ${bytesText(2 * seven)} in 16 bits: much for each task anew, but no ` +
            "disk is too small for it.",
        },
        {
          text: "The gradients of so many numbers are too small to be exact",
          why: "How exact a gradient is does not depend on how many there are beside it.",
        },
      ],
    },
    {
      text: "An update has low rank. What does that mean?",
      options: [
        {
          text: "It moves few of the weights, and leaves the others as they are",
          why: "That is a sparse update. One of rank 1 usually moves every single weight.",
        },
        {
          text: "It is a product of two thin matrices: it acts along few directions",
          right: true,
          why:
            "An update of rank r is a sum of r outer products, as in part 3. That updates of " +
            "trained models are near to such a sum is an observation, no theorem.",
        },
        {
          text: "Its numbers are small",
          why: "Rank does not see size: twice a matrix has the same rank.",
        },
      ],
    },
    {
      text: "Why does B start at zero?",
      options: [
        {
          text: "So that training starts from exactly the model that was loaded",
          right: true,
          why:
            "B A is then zero, and so is the update, to the bit. A has to be random all the " +
            "same: with both at zero every gradient is zero, for ever. In part 4, dL/dA is 0 " +
            "before the first step and dL/dB is not.",
        },
        {
          text: "To save memory until the first step",
          why: "A zero takes as many bytes as any other number.",
        },
        {
          text: "Because A and B could not be told apart otherwise",
          why:
            "Their shapes differ, and it makes no difference which of the two is zero: one of " +
            "them has to be.",
        },
      ],
    },
    {
      text: "LoRA can be merged into the weights, prefix tuning cannot. Why?",
      options: [
        {
          text: "A prefix has more numbers than there is room for in the weights",
          why: "It has few. What matters is where they act, not how many there are.",
        },
        {
          text:
            "LoRA's update is a matrix that is added to W; a prefix is further keys and " +
            "values that each token weighs by a softmax",
          right: true,
          why:
            "W + (alpha / r) B A is a matrix of W's shape: no cost is left when the model " +
            "answers. What a prefix adds depends on the token that looks at it, so no fixed " +
            "matrix does the same.",
        },
        {
          text: "Nobody has written the code for it",
          why:
            "There is none to be written: what a prefix does is no linear function of a " +
            "layer's input.",
        },
      ],
    },
    {
      text:
        "A model has 12 layers and is 768 wide. By how much does r = 16 reduce what is " +
        "trained?",
      options: [
        {
          text: "By 95.8 %, for the model",
          why:
            `That is one matrix of 768 × 768: ${whole(square)} numbers beside ` +
            `${whole(768 * 768)}. A model has more than one, and not all square.`,
        },
        {
          text: "By 95.8 % for each 768 × 768 matrix; for the model it depends on what is adapted",
          right: true,
          why:
            `${whole(square)} numbers instead of ${whole(768 * 768)} are ` +
            `${percent(1 - square / 768 ** 2)} fewer. Of the whole GPT-2, which has this ` +
            `shape, ${whole(qv("gpt2").trainable)} numbers are trained on q and v and ` +
            `${whole(all("gpt2").trainable)} on every linear: ${reduction(qv("gpt2"))} and ` +
            `${reduction(all("gpt2"))} less than all ` +
            `${whole(all("gpt2").all - all("gpt2").trainable)}. Of Llama-2-7B: ` +
            `${reduction(qv("llama-2-7b"))} and ${reduction(all("llama-2-7b"))}.`,
        },
        {
          text: "It then trains 24 times faster",
          why:
            "24 is how many times fewer numbers there are. A step still goes forward and back " +
            "through all of W: what is saved is the gradient of W, at most a third of a " +
            "layer's work, and the optimizer's.",
        },
      ],
    },
    {
      text: "A 7B model has been tuned on support data by LoRA. What is deployed?",
      options: [
        {
          text: "The adapter alone",
          why:
            "It is an update and answers nothing by itself: it needs the very base it was " +
            "trained on.",
        },
        {
          text:
            "The base once, and beside it a small adapter; or one model with the adapter " +
            "merged in",
          right: true,
          why:
            `For Llama-2-7B with r = 16 in 16 bits: ${bytesText(2 * seven)} once, and ` +
            `${bytesText(2 * qv("llama-2-7b").trainable)} (q and v) to ` +
            `${bytesText(2 * all("llama-2-7b").trainable)} (every linear) for each task. ` +
            `Merged, there is no adapter any more: ${bytesText(2 * seven)} for each task.`,
        },
        {
          text: "A copy of the whole model, in which 7 billion numbers have changed",
          why:
            "That is full fine-tuning. A merged model is as large, but who keeps the adapter " +
            "apart needs the base once for all tasks.",
        },
      ],
    },
  ];
}
