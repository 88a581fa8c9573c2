// The component's entry: called by Streamlit when the viewer is mounted, and again with every new scene.

import { element } from "./dom.js";
import { Screen } from "./screen.js";

const LEAST = 560, BELOW = 14; // CSS pixels: height of a viewer, and what is left free under it
const mounted = new WeakMap();

/** The volume or the layout is another: everything is built anew. Else the user's place and look are kept. */
const identity = ({ data, shape, layout, compare, case: name }) => JSON.stringify([data, shape, layout, compare, name]);

export default function mount({ data: scene, parentElement, setTriggerValue }) {
  let viewer = mounted.get(parentElement);
  if (!viewer) {
    const root = element("div.viewer", { tabIndex: 0, role: "application", "aria-label": "Slice viewer" });
    parentElement.append(root);
    viewer = { root, screen: null };
    viewer.fit = () => fill(root);
    window.addEventListener("resize", viewer.fit);
    mounted.set(parentElement, viewer);
  }
  fill(viewer.root);
  viewer.send = (events) => setTriggerValue("event", events);
  if (viewer.screen && viewer.identity === identity(scene)) viewer.screen.update(scene);
  else {
    viewer.screen?.close();
    viewer.screen = new Screen(viewer.root, scene, (events) => viewer.send(events));
    viewer.identity = identity(scene);
    if (document.activeElement === document.body) viewer.root.focus({ preventScroll: true });
  }
  return () => {
    if (parentElement.isConnected) return; // a newer scene overtook this one while it was on its way: nothing is over
    window.removeEventListener("resize", viewer.fit);
    viewer.screen?.close();
    viewer.screen = null; // this function is kept by Streamlit for longer, the volume must not be
    viewer.root.remove();
    mounted.delete(parentElement);
  };
}

/** The viewer takes the rest of the window's height, so that nothing of it has to be scrolled to. */
function fill(root) {
  let above = root.getBoundingClientRect().top;
  for (let node = root.getRootNode().host; node; node = node.parentElement) above += node.scrollTop; // wherever one is
  root.style.setProperty("--height", `${Math.max(LEAST, window.innerHeight - above - BELOW)}px`);
}
