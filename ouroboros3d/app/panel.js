// Shows the messages of ouroboros3d/app/panel.py: `props.value` is {run, data, step} as JSON, one step per message.
let player = null;
let run = null;

function update() {
  if (!props.value) return;
  const message = JSON.parse(props.value);
  if (message.run !== run) {
    player?.close();
    const root = document.createElement("div");
    element.querySelector(".player").replaceChildren(root);
    player = createPlayer(root, message.data);
    run = message.run;
  }
  if (message.step) player.addStep(message.step);
  window.player = player;
}

watch("value", update);
update();
